"""Rows of a table from bytes: a JSON object's columns as numbers, checked without torch.

{"age": 41, "town": "Ulm"}   ─► age    2 (x - low) / (high - low) - 1, and whether it is missing
                             ─► town   its words and their trigrams, hashed into ``buckets``
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cfm_train.errors import UserError, nearest


@dataclass(frozen=True)
class Columns:
    """What is read of a row, see `cfm_train.modality.encoders.table`.

    Attributes:
        numbers: columns of numbers, each with its range ``[low, high]``, sorted.
        texts: columns of words, sorted.
        ignored: columns that are not read.
        buckets: numbers that a text is hashed into.
    """

    numbers: dict[str, list[float]]
    texts: list[str]
    ignored: list[str]
    buckets: int

    @property
    def names(self) -> list[str]:
        """The columns that are read, in order."""
        return [*self.numbers, *self.texts]

    def read(self, content: bytes, at: str) -> list[list[float]]:
        """The features of each column.

        Args:
            content: a JSON object.
            at: where it stands, for the error sentence.

        Raises:
            UserError: it is none, has a column that nobody named, or a value of another type.
        """
        row = _object(content, at)
        for name in row:
            if name not in self.names and name not in self.ignored:
                raise UserError(
                    f"{at}: the encoder does not read the column '{name}'."
                    f"{nearest(name, self.names)} Add it to encoder.numbers, encoder.texts or "
                    "encoder.ignored."
                )
        parts = [self._number(row.get(name), name, at) for name in self.numbers]
        return parts + [self._text(row.get(name), name, at) for name in self.texts]

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
