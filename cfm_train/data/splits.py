"""Train, validation and test share no row, by what the rows say and not by where they stand.

A row is known by the SHA-256 of its input columns, in Unicode's composed form with runs of white
space folded to one blank. The same hash cuts validation out of train, so that a row stays on its
side when rows are added or moved, and equal rows are always on the same side.
"""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass, field
from typing import Any

from cfm_train.data.rows import Row

EXAMPLES = 5


@dataclass
class Leaks:
    """Rows that were dropped because another split holds the same input.

    Attributes:
        counts: ``"train in test"`` -> rows dropped.
        examples: the first few, as ``"a.jsonl:3 = b.jsonl:7"``.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """All rows dropped."""
        return sum(self.counts.values())

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        return {"total": self.total, "counts": self.counts, "examples": self.examples}


def input_of(row: Row) -> list[str]:
    """The input side of a row, as texts: what must not stand in two splits."""
    if "messages" in row:
        return [m["content"] for m in row["messages"] if m["role"] == "user"]
    if "tokens" in row:
        return [" ".join(row["tokens"])]
    return list(row["text"])


def content_hash(row: Row) -> bytes:
    """SHA-256 of a row's normalised input, 32 bytes."""
    folded = (" ".join(unicodedata.normalize("NFC", text).split()) for text in input_of(row))
    return hashlib.sha256("\x1f".join(folded).encode("utf-8", "surrogatepass")).digest()


def cut(rows: list[Row], fraction: float, draw: int) -> tuple[list[Row], list[Row]]:
    """Cuts a share of the rows out by content hash.

    Args:
        rows: the rows.
        fraction: expected share that is cut, from 0 (none) up to but not including 1.
        draw: which eight bytes of the hash decide, from 0 to 3: cuts with different draws are
            independent of each other.

    Returns:
        What is left, and what was cut; at least one row on each side where there are two different
        rows and a fraction above 0.
    """
    if fraction <= 0 or not rows:
        return rows, []
    draws = [_draw(row, draw) / 2**64 for row in rows]
    if len(set(draws)) == 1:  # the same row again and again: it stays where it is
        return rows, []
    # Of a handful of rows the lowest draw is cut and the highest stays.
    threshold = min(max(fraction, min(draws) + 2**-53), max(draws))
    kept = [row for row, number in zip(rows, draws, strict=True) if number >= threshold]
    taken = [row for row, number in zip(rows, draws, strict=True) if number < threshold]
    return kept, taken


def _draw(row: Row, number: int) -> int:
    return int.from_bytes(content_hash(row)[8 * number : 8 * number + 8], "big")


def make_disjoint(splits: dict[str, list[Row]]) -> tuple[dict[str, list[Row]], Leaks]:
    """Drops from train what validation or test holds, and from validation what test holds.

    Test is never touched: results stay comparable with everyone else's.
    """
    leaks = Leaks()
    seen: dict[bytes, tuple[str, str]] = {}
    result: dict[str, list[Row]] = {}
    for name in ("test", "validation", "train"):
        kept: list[Row] = []
        own: dict[bytes, tuple[str, str]] = {}
        for row in splits.get(name, []):
            key = content_hash(row)
            holder, at = seen.get(key, (None, ""))
            if holder is None:
                kept.append(row)
                own.setdefault(key, (name, row["_at"]))
                continue
            pair = f"{name} in {holder}"
            leaks.counts[pair] = leaks.counts.get(pair, 0) + 1
            if len(leaks.examples) < EXAMPLES:
                leaks.examples.append(f"{row['_at']} = {at}")
        seen |= own  # equal rows within one split are no leak
        result[name] = kept
    return {name: result[name] for name in ("train", "validation", "test")}, leaks


def take(rows: list[Row], limit: int | None) -> list[Row]:
    """At most ``limit`` rows, chosen by content hash, in their old order."""
    if limit is None or len(rows) <= limit:
        return rows
    order = sorted(range(len(rows)), key=lambda i: (_draw(rows[i], 2), i))
    return [rows[i] for i in sorted(order[:limit])]
