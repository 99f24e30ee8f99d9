"""Rows of a table: numbers within declared ranges and hashed words, an encoder without weights.

    {"age": 41, "town": "Ulm"}   ─► age    2 (x - low) / (high - low) - 1, and whether it is missing
                                 ─► town   its words and their trigrams, hashed into ``buckets``

``each=row`` puts all columns behind each other into one vector; ``each=column`` makes a vector of
each column, with one number for each column to tell which it is: for connectors that attend.
Hashing is by SHA-256, with signs (Weinberger et al. 2009, arXiv 0902.2206): the same everywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from cfm_train.config.types import Positive
from cfm_train.errors import UserError, nearest
from cfm_train.modality.encoders.encoder import Encoder, padded
from cfm_train.modality.fitting import check_columns


class Table(Encoder):
    """Features of a table's rows.

    Args:
        numbers: columns of numbers, each with its range ``[low, high]``; numbers beyond it are
            taken as they are. None for no such columns.
        texts: columns of words.
        ignored: columns that items may have and that are not read.
        buckets: numbers that a text is hashed into.
        each: one vector for each ``row`` or for each ``column``.
    """

    modality = "table"

    def __init__(
        self,
        numbers: dict[str, list[float]] | None,
        texts: list[str],
        ignored: list[str],
        buckets: Positive,
        each: Literal["row", "column"],
    ) -> None:
        super().__init__()
        check_columns(numbers, texts, ignored)
        self.numbers = dict(sorted((numbers or {}).items()))
        self.texts, self.ignored = sorted(texts), set(ignored)
        self.buckets, self.each = buckets, each

    def build(self, folder: Path | None) -> Self:
        """Nothing to read."""
        self.names = [*self.numbers, *self.texts]
        sizes = [2] * len(self.numbers) + [self.buckets + 1] * len(self.texts)
        self.width = sum(sizes) if self.each == "row" else len(sizes) + max(sizes)
        return self

    def load(self, content: bytes, at: str) -> Tensor:
        """The features themselves, float32 ``[1 or columns, width]``."""
        row = _object(content, at)
        for name in row:
            if name not in self.names and name not in self.ignored:
                raise UserError(
                    f"{at}: the encoder does not read the column '{name}'."
                    f"{nearest(name, self.names)} Add it to encoder.numbers, encoder.texts or "
                    "encoder.ignored."
                )
        parts = [self._number(row.get(name), name, at) for name in self.numbers]
        parts += [self._text(row.get(name), name, at) for name in self.texts]
        if self.each == "row":
            return torch.tensor([[value for part in parts for value in part]])
        found = torch.zeros(len(parts), self.width)
        for at_column, part in enumerate(parts):
            found[at_column, at_column] = 1
            found[at_column, len(parts) : len(parts) + len(part)] = torch.tensor(part)
        return found

    def features(self, items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As they are, padded."""
        return padded(items)

    def _number(self, value: Any, name: str, at: str) -> list[float]:
        """A number within its range as -1 to 1, and 0; nothing and 1 where it is missing."""
        if value is None or value == "":
            return [0.0, 1.0]
        low, high = self.numbers[name]
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{at}: the column '{name}' must be a number, found {value!r}.")
        return [2 * (number - low) / (high - low) - 1, 0.0]

    def _text(self, value: Any, name: str, at: str) -> list[float]:
        """A text's hashed words and trigrams, of length 1, and 0; nothing and 1 where missing."""
        if value is None or value == "":
            return [0.0] * self.buckets + [1.0]
        if isinstance(value, dict | list):
            raise UserError(f"{at}: the column '{name}' must be a text, found {value!r}.")
        return [*hashed(str(value), self.buckets), 0.0]


def hashed(text: str, buckets: int) -> list[float]:
    """A text's words and the trigrams within them, each in a bucket with a sign; of length 1.

    Args:
        text: any text; case does not count.
        buckets: how many numbers.
    """
    found = [0.0] * buckets
    for word in re.findall(r"\w+", text.casefold()) or [text]:
        framed = f"<{word}>"
        pieces = [framed[i : i + 3] for i in range(len(framed) - 2)] if len(word) > 1 else []
        for piece in [word, *pieces]:
            digest = hashlib.sha256(piece.encode()).digest()
            found[int.from_bytes(digest[:8], "big") % buckets] += 1.0 if digest[8] & 1 else -1.0
    length = math.sqrt(sum(value * value for value in found))
    return [value / length for value in found] if length else found


def _object(content: bytes, at: str) -> Mapping[str, Any]:
    try:
        row = json.loads(content)
    except ValueError as error:
        raise UserError(f"{at}: is no JSON object ({error}).") from None
    if not isinstance(row, dict):
        raise UserError(f"{at}: a table's row is a JSON object, found {type(row).__name__}.")
    return row
