"""Documents and questions as token numbers: what is learnt, what a teacher reads, what is asked.

    student   [front | prompt answer]
    teacher   [front | passage | line break | prompt answer]

``front`` is what the tokenizer puts before every text (a beginning-of-text token, or nothing). A
prompt and its answer are tokenised as one text with a blank between them, and the answer begins
with the first token that reaches into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cfm_train.data.encode import Encoded
from cfm_train.data.encoders import Arrays, Settings, document_pieces, flat, in_blocks
from cfm_train.data.rows import Row
from cfm_train.data.tasks import IGNORED
from cfm_train.knowledge.documents import Documents, Passage, Question


@dataclass(frozen=True)
class Item:
    """One row to learn or to ask.

    Attributes:
        ids: token ids, ``front`` among them.
        start: the first token that counts.
        context: what a teacher reads before, with ``front``; empty for nothing.
        row: what it was made from.
    """

    ids: list[int]
    start: int
    context: list[int]
    row: Row


class Reader:
    """Tokenises what documents hold.

    Args:
        documents: the documents.
        tokenizer: the backbone's, a fast one.
        max_length: most tokens of a row.
        context: most tokens of a passage in a context, with its line break; what is cut lies far
            from the question.

    Attributes:
        cut: how many of the passages that were shown did not fit into a context.
    """

    def __init__(self, documents: Documents, tokenizer: Any, max_length: int, context: int) -> None:
        self.documents = documents
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.context = context
        self.cut = 0
        with_front, plain = tokenizer("a")["input_ids"], self.ids("a")
        self.front: list[int] = with_front[: with_front.index(plain[0])] if plain else []
        self.gap = self.ids("\n")

    def ids(self, text: str) -> list[int]:
        """A text's tokens alone."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return found

    def whole(self, most: int | None = None) -> list[int]:
        """All documents behind each other, from the first on, with ``front``."""
        found = list(self.front)
        for row in self.documents.rows:
            if most is not None and len(found) >= most:
                break
            found += [*self.gap, *self.ids(row["text"][0])] if found else self.ids(row["text"][0])
        return found[:most]

    def passage(self, passage: Passage, place: int) -> list[int]:
        """A passage as a context, with ``front`` and a line break; cut around a character of it."""
        encoded = self.tokenizer(
            passage.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = encoded["input_ids"]
        room = self.context - len(self.gap)
        if len(ids) > room:
            self.cut += 1
            ends = [end for _, end in encoded["offset_mapping"]]
            at = next((i for i, end in enumerate(ends) if end > place), len(ids))
            start = min(max(0, at - room // 2), len(ids) - room)
            ids = ids[start : start + room]
        return [*self.front, *ids, *self.gap]

    def question(self, question: Question, *, context: bool = False) -> Item:
        """A question with its answer; the answer counts."""
        text = f"{question.prompt} {question.answer}"
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = encoded["input_ids"]
        ends = [end for _, end in encoded["offset_mapping"]]
        answer = sum(end > len(question.prompt) for end in ends)
        ids = ids[-(self.max_length - len(self.front)) :]  # what is lost is a prompt's beginning
        passage = self.documents.passages[question.passage]
        row = {"text": [question.prompt, question.answer], "_at": question.at}
        return Item(
            [*self.front, *ids],
            len(self.front) + max(0, len(ids) - answer),
            self.passage(passage, question.place) if context else [],
            row,
        )

    def sentences(self) -> list[Item]:
        """Every sentence of every passage, with its passage as the context; all of it counts."""
        items = []
        for passage in self.documents.passages:
            for start, end in passage.sentences:
                ids = [*self.front, *self.ids(passage.text[start:end])][: self.max_length]
                if len(ids) > 1:
                    row = {"text": [passage.text[start:end]], "_at": passage.at}
                    items.append(Item(ids, 1, self.passage(passage, start), row))
        return items

    def blocks(self, rows: Sequence[Row], items: Sequence[Item]) -> Encoded:
        """Documents and questions for language modelling, packed together into blocks.

        Args:
            rows: documents: every token but each one's first is learnt.
            items: rows of which only the end is learnt.
        """
        settings = Settings(self.max_length, 0, pack=True)
        pieces, owners = document_pieces(list(rows), self.tokenizer, settings)
        labels = [*pieces, *(marks(item) for item in items)]
        pieces = [*pieces, *(item.ids for item in items)]
        owners = [*owners, *range(len(rows), len(rows) + len(items))]
        arrays = in_blocks(pieces, labels, owners, settings)
        return Encoded(arrays, [*rows, *(item.row for item in items)], 0, self.max_length)

    def rows(self, items: Sequence[Item]) -> Encoded:
        """Items one by one; ``answer_starts`` is where each begins to count."""
        arrays: Arrays = {}
        arrays["input_ids"], arrays["offsets"] = flat([item.ids for item in items])
        arrays["token_labels"] = flat([marks(item) for item in items])[0]
        arrays["answer_starts"] = np.array([item.start for item in items], np.int32)
        if any(item.context for item in items):
            arrays["context_ids"], arrays["context_offsets"] = flat([i.context for i in items])
        return Encoded(arrays, [item.row for item in items], 0, self.max_length)


def marks(item: Item) -> list[int]:
    """An item's tokens as labels, -100 before its start."""
    return [IGNORED] * item.start + item.ids[item.start :]


def shown(item: Item, front: int) -> Item:
    """An item with its context before it, as a prompt has it.

    Args:
        item: an item with a context.
        front: how many of its tokens the tokenizer puts before every text.
    """
    ids = [*item.context, *item.ids[front:]]
    return Item(ids, item.start + len(ids) - len(item.ids), [], item.row)
