"""Rows of a table: numbers within declared ranges and hashed words, an encoder without weights.

    {"age": 41, "town": "Ulm"}   ─► age    2 (x - low) / (high - low) - 1, and whether it is missing
                                 ─► town   its words and their trigrams, hashed into ``buckets``

``each=row`` puts all columns behind each other into one vector; ``each=column`` makes a vector of
each column, with one number for each column to tell which it is: for connectors that attend.
Hashing is by SHA-256, with signs (Weinberger et al. 2009, arXiv 0902.2206): the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from cfm_train.config.types import Positive
from cfm_train.modality.encoders.encoder import Encoder, padded
from cfm_train.modality.fitting import check_columns
from cfm_train.modality.table import Columns


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
        ordered = dict(sorted((numbers or {}).items()))
        self.columns = Columns(ordered, sorted(texts), ignored, buckets)
        self.each = each

    def build(self, folder: Path | None) -> Self:
        """Nothing to read."""
        own = self.columns
        sizes = [2] * len(own.numbers) + [own.buckets + 1] * len(own.texts)
        self.width = sum(sizes) if self.each == "row" else len(sizes) + max(sizes)
        return self

    def load(self, content: bytes, at: str) -> Tensor:
        """The features themselves, float32 ``[1 or columns, width]``."""
        parts = self.columns.read(content, at)
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
