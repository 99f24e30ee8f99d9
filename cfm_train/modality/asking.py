"""What a language model with finished modality bricks is asked: prompts, and their features.

    row and items ─► token ids up to its last answer, placeholders among them
    rows of one length ─► one batch, with the features of every modality

A row is asked as it was trained on: its text is cut at the same places, so that what follows the
prompt (a class, a caption) has the tokens that the loss was taken on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cfm_train.data.rows import Row
from cfm_train.data.tasks import IGNORED
from cfm_train.errors import UserError
from cfm_train.modality.cache import FeatureCache
from cfm_train.modality.encoding import given, row_ids
from cfm_train.modality.modality import Modality


@dataclass(frozen=True)
class Sense:
    """One modality of a run.

    Attributes:
        brick: reads it.
        cache: the features of its items.
    """

    brick: Modality
    cache: FeatureCache

    def tokens(self, item: str) -> list[int]:
        """The ids that stand for an item."""
        return [self.brick.sentinel] * self.brick.count(self.cache.length(item))


def asked_ids(
    rows: Sequence[Row],
    held: Sequence[Sequence[str]],
    senses: Mapping[str, Sense],
    tokenizer: Any,
    *,
    room: int,
    limit: int,
    what: str,
) -> list[list[int]]:
    """The ids of each row's prompt: all before its last answer.

    Args:
        rows: see `cfm_train.modality.items`.
        held: the items of each, by hash: its own, or others (a control).
        senses: by modality, all that the rows have items of.
        tokenizer: the backbone's.
        room: tokens that must fit behind a prompt.
        limit: most tokens of a prompt and what follows it.
        what: that follows it, for the error sentence.

    Raises:
        UserError: a prompt leaves no room.
    """
    prompts = []
    for row, items in zip(rows, held, strict=True):
        ids, start = _whole(row, items, senses, tokenizer)
        if start + room > limit:
            raise UserError(
                f"{row['_at']}: its items, its prompt and {what} take {start + room} tokens, and "
                f"{limit} are allowed (data.max_length, and what the backbone reads)."
            )
        prompts.append(ids[:start])
    return prompts


def said_ids(row: Row, text: str, senses: Mapping[str, Sense], tokenizer: Any) -> list[int]:
    """The ids of a text in place of a row's last answer, with the token that ends it.

    Args:
        row: says what stands before the answer.
        text: the answer.
        senses: by modality.
        tokenizer: the backbone's.
    """
    if "turns" in row:
        answer = {"role": "assistant", "content": text}
        changed: Row = {**row, "turns": [*row["turns"][:-1], answer]}
    else:
        changed = {**row, "answer": text}
    items = changed["text"][: len(changed["_items"])]
    queues = _queues(changed, items, senses)
    ids, marks = row_ids(changed, queues, tokenizer)
    return [
        token
        for token, mark in list(zip(ids, marks, strict=True))[_start(marks) :]
        if mark != IGNORED
    ]


def features_of_rows(
    rows: Sequence[Row], held: Sequence[Sequence[str]], senses: Mapping[str, Sense]
) -> dict[str, Any]:
    """The features of some rows' items as a batch, see `Modality.take`."""
    batch: dict[str, Any] = {}
    for kind, sense in senses.items():
        batch |= given(
            kind,
            [
                [
                    sense.cache.read(item)
                    for item, own in zip(items, row["_kinds"], strict=True)
                    if own == kind
                ]
                for row, items in zip(rows, held, strict=True)
            ],
        )
    return batch


def alike(prompts: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    """Numbers of rows whose prompts have one length, at most so many together."""
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(i)
    for members in groups.values():
        for start in range(0, len(members), most):
            yield members[start : start + most]


def _whole(
    row: Row, items: Sequence[str], senses: Mapping[str, Sense], tokenizer: Any
) -> tuple[list[int], int]:
    """The ids of a row with these items, and where its last answer starts."""
    ids, marks = row_ids(row, _queues(row, items, senses), tokenizer)
    return ids, _start(marks)


def _queues(
    row: Row, items: Sequence[str], senses: Mapping[str, Sense]
) -> dict[str, list[list[int]]]:
    queues: dict[str, list[list[int]]] = {f"<{kind}>": [] for kind in senses}
    for kind, item in zip(row["_kinds"], items, strict=True):
        queues[f"<{kind}>"].append(senses[kind].tokens(item))
    return queues


def _start(marks: Sequence[int]) -> int:
    """Where the last run of labels starts."""
    end = max(i for i, mark in enumerate(marks) if mark != IGNORED)
    return next((i + 1 for i in range(end, -1, -1) if marks[i] == IGNORED), 0)
