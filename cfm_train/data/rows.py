"""From a row of a file to a row of a task: the columns picked, every value checked.

A finished row is a plain dict: ``_at`` ("file:line") and, by task type,

    classification, multilabel, regression   text: [str] or [str, str]                 label
    token          text: [str], tokens: [str], words: [[start, end]]                   label: [tag]
    causal         text: [str]; prompt: True where the text is to be continued
    instruct       messages: [{"role", "content"}], the last one the answer
    seq2seq        text: [str]                                                         target: str

Labels are still names or numbers here; ``labels.LabelTable`` makes them positions. Rows to predict
are the same without ``label``, ``target`` and the answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from cfm_train.data.conversations import conversation, joined
from cfm_train.data.files import Raw, type_name
from cfm_train.data.labels import BadRow, as_label
from cfm_train.data.tagging import from_spans, from_tokens
from cfm_train.data.tasks import as_columns

Row = dict[str, Any]

#: The largest number that float32 holds; targets are kept in it.
LARGEST = (2 - 2**-23) * 2.0**127


class MissingColumn(BadRow):
    """A row lacks a column; carries what it has, so that the nearest name can be offered."""

    def __init__(self, key: str, column: str, available: list[str]) -> None:
        super().__init__(f"there is no column '{column}'")
        self.key, self.column, self.available = key, column, available


class Cells:
    """The cells of one row, by the section's column keys."""

    def __init__(self, raw: Raw, section: Mapping[str, Any]) -> None:
        self.values = raw.values or {}
        self.typed = raw.typed
        self.section = section

    def of(self, key: str) -> list[tuple[str, Any]]:
        """Column and value of every column that a key names."""
        cells = []
        for column in as_columns(self.section[key]):
            if column not in self.values:
                raise MissingColumn(key, column, list(self.values))
            cells.append((column, self.values[column]))
        return cells

    def structured(self, key: str) -> Any:
        """The value of the one column of a key, where it may be a list; CSV writes it as JSON."""
        (column, value) = self.of(key)[0]
        if self.typed or not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
            return value
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRow(f"column '{column}' holds broken JSON ({error.msg})") from error

    def texts(self, key: str, *, empty: bool = False) -> list[str]:
        """The texts of a key's columns; blank ones only where ``empty`` says so."""
        texts = []
        for column, value in self.of(key):
            if not isinstance(value, str):
                raise BadRow(f"column '{column}' must be text, found {type_name(value)}")
            if not empty and not value.strip():
                raise BadRow(f"column '{column}' is empty")
            texts.append(value)
        return texts


def classification(cells: Cells, answers: bool) -> Row:
    """One text or a pair, and one label."""
    row: Row = {"text": cells.texts("text")}
    if answers:
        row["label"] = as_label(cells.of("label")[0][1], cells.typed)
    return row


def multilabel(cells: Cells, answers: bool) -> Row:
    """One text or a pair, and any number of labels: a list in a column, or a column of 0/1 each."""
    row: Row = {"text": cells.texts("text")}
    if answers and len(as_columns(cells.section["label"])) > 1:
        row["label"] = [column for column, value in cells.of("label") if _flag(column, value)]
    elif answers:
        value = cells.structured("label")
        if isinstance(value, str) and not cells.typed:
            value = [part for part in value.split(";") if part.strip()]
        if not isinstance(value, list):
            raise BadRow(f"labels must be a list of names or numbers, found {type_name(value)}")
        row["label"] = list(dict.fromkeys(as_label(item, cells.typed) for item in value))
    return row


def _flag(column: str, value: Any) -> bool:
    known = {"0": False, "1": True, "false": False, "true": True, "0.0": False, "1.0": True}
    flag = known.get(str(value).strip().lower())
    if flag is None:
        raise BadRow(f"column '{column}' must be 0 or 1, found {value!r}")
    return flag


def regression(cells: Cells, answers: bool) -> Row:
    """One text or a pair, and one number."""
    row: Row = {"text": cells.texts("text")}
    if answers:
        column, value = cells.of("label")[0]
        try:
            number = float(value) if not isinstance(value, str) or not cells.typed else math.nan
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or isinstance(value, bool):
            raise BadRow(f"column '{column}' must be a number, found {value!r}")
        if abs(number) > LARGEST:
            raise BadRow(f"column '{column}' must be a number up to 3.4e38, found {value!r}")
        row["label"] = number
    return row


def token(cells: Cells, answers: bool) -> Row:
    """Words with a tag each, or a text with labelled spans of characters."""
    value = cells.structured("text")
    labels = cells.structured("label") if answers else None
    if isinstance(value, list):
        return from_tokens(value, labels)
    return from_spans(cells.texts("text")[0], labels)


def causal(cells: Cells, answers: bool) -> Row:
    """One document, or the beginning of one that is to be continued."""
    return {"text": cells.texts("text"), **({} if answers else {"prompt": True})}


def instruct(cells: Cells, answers: bool) -> Row:
    """A conversation, whole in one column, or made of a question, an answer and a system prompt."""
    if cells.section["messages"]:
        return {"messages": conversation(cells.structured("messages"), answers)}
    question = joined(cells.texts("text", empty=True))
    if not question:
        raise BadRow(f"column '{as_columns(cells.section['text'])[0]}' is empty")
    messages = [{"role": "user", "content": question}]
    system = joined(cells.texts("system", empty=True))
    if system:
        messages.insert(0, {"role": "system", "content": system})
    if answers:
        messages.append({"role": "assistant", "content": cells.texts("target")[0]})
    return {"messages": messages}


def seq2seq(cells: Cells, answers: bool) -> Row:
    """A text and what it becomes; several text columns are joined by blank lines."""
    row: Row = {"text": [joined(cells.texts("text"))]}
    if answers:
        row["target"] = cells.texts("target")[0]
    return row


PARSERS = {
    parser.__name__: parser
    for parser in (classification, multilabel, regression, token, causal, instruct, seq2seq)
}


def parse(raw: Raw, section: Mapping[str, Any], *, answers: bool = True) -> Row:
    """One row of a task.

    Args:
        raw: the row as it stands in the file.
        section: the data section; its ``task`` chooses the form, its column keys the cells.
        answers: whether the row must hold its answer; rows to predict do not.

    Raises:
        BadRow: why the row cannot be used.
    """
    if raw.values is None:
        raise BadRow(raw.problem or "cannot be read")
    return {**PARSERS[section["task"]](Cells(raw, section), answers), "_at": raw.at}
