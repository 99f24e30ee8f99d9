"""Rows with items as token numbers, the placeholders in place, and batches with their features.

The text is cut at the items; each piece is tokenised by itself, and between two pieces stand as
many placeholders as the item becomes tokens. Where a prompt ends and an answer begins is a cut too,
so that a class's name has the same tokens in training and when it is scored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from cfm_train.data.conversations import answer_spans
from cfm_train.data.encode import Encoded
from cfm_train.data.encoders import flat
from cfm_train.data.rows import Row
from cfm_train.data.tasks import IGNORED
from cfm_train.errors import UserError
from cfm_train.modality.items import hashes

#: Features of an item by its hash, ``[n, d_v]``.
Source = Callable[[str], np.ndarray]


@dataclass
class ItemRows(Encoded):
    """One split as token numbers, with where the features of its items are.

    Attributes:
        modality: what the items are called.
        held: the hashes of each row's items.
        source: gives an item's features.
    """

    modality: str
    held: list[list[str]]
    source: Source

    def extras(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """The features of these rows' items, see `Modality.take`."""
        rows = [self.held[int(i)] for i in indices]
        return given(self.modality, [[self.source(item) for item in row] for row in rows])


def given(modality: str, rows: Sequence[Sequence[np.ndarray]]) -> dict[str, Any]:
    """Features of rows of items as a batch holds them, see `Modality.take`."""
    parts = [np.asarray(item) for row in rows for item in row]
    if not parts:
        return {}
    longest = max(len(part) for part in parts)
    features = np.zeros((len(parts), longest, parts[0].shape[1]), parts[0].dtype)
    mask = np.zeros((len(parts), longest), bool)
    for i, part in enumerate(parts):
        features[i, : len(part)] = part
        mask[i, : len(part)] = True
    return {
        f"{modality}/features": torch.from_numpy(features),
        f"{modality}/mask": torch.from_numpy(mask),
        f"{modality}/items": torch.tensor([len(row) for row in rows]),
    }


@dataclass(frozen=True)
class Placeholder:
    """What stands for an item in a prompt.

    Attributes:
        modality: ``<modality>`` in the text.
        sentinel: the token id that is written.
        count: tokens of an item with so many feature vectors.
        length: how many vectors an item has, by its hash.
    """

    modality: str
    sentinel: int
    count: Callable[[int], int]
    length: Callable[[str], int]

    def tokens(self, item: str) -> list[int]:
        """The ids that stand for an item."""
        return [self.sentinel] * self.count(self.length(item))


def encode_items(
    rows: list[Row],
    tokenizer: Any,
    placeholder: Placeholder,
    source: Source,
    max_length: int,
    held: list[list[str]] | None = None,
) -> ItemRows:
    """Rows as token numbers; labels on the answers and the tokens that end them.

    Args:
        rows: see `cfm_train.modality.items`.
        tokenizer: the backbone's.
        placeholder: what stands for an item.
        source: gives an item's features.
        max_length: most tokens of a row, placeholders included.
        held: other items for the rows (a control), as many for each as it has.

    Raises:
        UserError: a row has no room for its items and the beginning of its answer.
    """
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    begins: list[int] = []
    held = [hashes(row) for row in rows] if held is None else held
    truncated = 0
    for row, items in zip(rows, held, strict=True):
        queue = [placeholder.tokens(item) for item in items]
        tokens, marks = row_ids(row, {f"<{placeholder.modality}>": queue}, tokenizer)
        if len(tokens) > max_length:
            truncated += 1
            lost = placeholder.sentinel in tokens[max_length:]
            if lost or all(mark == IGNORED for mark in marks[:max_length]):
                raise UserError(
                    f"{row['_at']}: its items and its prompt take {len(tokens)} tokens, and "
                    f"data.max_length is {max_length}: raise it, or choose fewer tokens for an "
                    "item (connector.tokens)."
                )
            tokens, marks = tokens[:max_length], marks[:max_length]
        ids.append(tokens)
        labels.append(marks)
        begins.append(next(i for i, mark in enumerate(marks) if mark != IGNORED))
    arrays: dict[str, np.ndarray] = {}
    arrays["input_ids"], arrays["offsets"] = flat(ids)
    arrays["token_labels"] = flat(labels)[0]
    arrays["answer_starts"] = np.array(begins, np.int32)
    return ItemRows(arrays, rows, truncated, max_length, placeholder.modality, held, source)


def row_ids(
    row: Row, held: Mapping[str, list[list[int]]], tokenizer: Any
) -> tuple[list[int], list[int]]:
    """Token ids of one row and its labels.

    Args:
        row: see `cfm_train.modality.items`.
        held: marker -> the ids of its items, in order; as many as the row has markers.
        tokenizer: the backbone's.
    """
    if "turns" not in row:
        front = prompt_ids(row["prompt"], tokenizer, held)
        answer = answer_ids(row["prompt"], row["answer"], tokenizer)
        return [*front, *answer], [*([IGNORED] * len(front)), *answer]
    queues = {marker: list(items) for marker, items in held.items()}
    text, spans = answer_spans(row["turns"], tokenizer)
    tokens = [] if tokenizer.chat_template else special_prefix(tokenizer)
    marks = [IGNORED] * len(tokens)
    at = 0
    for piece in _pieces(text, list(held), [start for start, _ in spans]):
        if piece in queues:
            one = queues[piece].pop(0)
            tokens, marks = tokens + one, marks + [IGNORED] * len(one)
        elif piece:
            found = tokenizer(
                piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            for token, (s, e) in zip(found["input_ids"], found["offset_mapping"], strict=True):
                inside = s < e and any(a < at + e <= b for a, b in spans)
                tokens.append(token)
                marks.append(token if inside else IGNORED)
        at += len(piece)
    return tokens, marks


def _pieces(text: str, markers: Sequence[str], cuts: Sequence[int]) -> Iterator[str]:
    """A text cut at its markers, which are pieces of their own, and at some characters."""
    at = 0
    for piece in re.split(f"({'|'.join(map(re.escape, markers)) or '(?!)'})", text):
        ends = [0, *(cut - at for cut in cuts if at < cut < at + len(piece)), len(piece)]
        yield from (piece[a:b] for a, b in pairwise(ends))
        at += len(piece)


def prompt_ids(prompt: str, tokenizer: Any, held: Mapping[str, list[list[int]]]) -> list[int]:
    """The ids of a prompt.

    Args:
        prompt: text with markers such as ``<image>``.
        tokenizer: the backbone's.
        held: marker -> the ids of its items, in order; as many as the prompt has markers.
    """
    queues = {marker: list(items) for marker, items in held.items()}
    tokens = special_prefix(tokenizer)
    for piece in _pieces(prompt, list(held), []):
        if piece in queues:
            tokens += queues[piece].pop(0)
        elif piece:
            tokens += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens


def answer_ids(prompt: str, answer: str, tokenizer: Any, *, end: bool = True) -> list[int]:
    """The ids of what follows a prompt, with the token that ends it.

    A word goes on after a blank, unless the prompt ends with one or with an item.
    """
    apart = prompt and not prompt[-1].isspace() and not prompt.endswith(">")
    text = f" {answer}" if apart else answer
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    eos = tokenizer.eos_token_id
    return ids if eos is None or not end else [*ids, eos]


def special_prefix(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer writes before every text."""
    whole = list(tokenizer("a", verbose=False)["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            return whole[:at]
    return []


def control(rows: list[Row], seed: int) -> list[list[str]] | None:
    """Other rows' items for every row, see `shuffled`; None where a row is left with its own.

    What is scored with its own items is no control: its figures would be those of the test.
    """
    other = shuffled(rows, seed)
    return (
        None if any(hashes(row) == held for row, held in zip(rows, other, strict=True)) else other
    )


def shuffled(rows: list[Row], seed: int) -> list[list[str]]:
    """Other rows' items for every row: a control that a connector must do worse on.

    Rows get the items of a row that has as many of each modality, those about the same items the
    same; where there is no such row, items of any others, one by one.

    Args:
        rows: about two items or more, else each keeps its own.
        seed: decides who swaps.
    """
    groups: dict[tuple[str, ...], dict[tuple[str, ...], list[int]]] = {}
    for i, row in enumerate(rows):
        alike = groups.setdefault(tuple(row["_kinds"]), {})
        alike.setdefault(tuple(hashes(row)), []).append(i)
    draw = np.random.default_rng(seed)
    other: list[list[str]] = [[] for _ in rows]
    for kinds, alike in groups.items():
        known = list(alike)
        order = [known[i] for i in draw.permutation(len(known))]
        for here, there in zip(order, [*order[1:], order[0]], strict=True):
            given_instead = list(there) if here != there else _any_others(here, kinds, rows, draw)
            for i in alike[here]:
                other[i] = given_instead
    return other


def _any_others(
    items: Sequence[str], kinds: Sequence[str], rows: list[Row], draw: np.random.Generator
) -> list[str]:
    """For each item another of its modality; itself where there is none."""
    found = []
    for item, kind in zip(items, kinds, strict=True):
        free = [
            one
            for row in rows
            for one, its in zip(hashes(row), row["_kinds"], strict=True)
            if its == kind and one not in items
        ]
        found.append(free[draw.integers(len(free))] if free else item)
    return found
