"""Keep the largest numbers of each update: the trim of TIES (Yadav et al. 2023, arXiv
2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cfm_train.config.types import Fraction
from cfm_train.merging.sparsify.sparsifier import Sparsifier, largest, same_l1


class Magnitude(Sparsifier):
    """Keeps ``max(1, ⌊density · n⌋)`` numbers of each input's ``n``, those of largest magnitude.

    Of numbers with equal magnitude the first by position are kept, so that exactly so many remain
    (bfloat16 weights tie often).

    Args:
        density: share that is kept, 0 to 1.
        rescale: ``l1`` gives what is left the L1 norm of the whole, ``none`` leaves it.
    """

    def __init__(self, density: Fraction, rescale: Literal["none", "l1"]) -> None:
        self.density = density
        self.rescale = rescale

    def sparsify(self, updates: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """See the class."""
        if self.density >= 1:
            return updates
        trimmed = torch.zeros_like(updates)
        for whole, kept in zip(updates, trimmed, strict=True):
            flat = whole.reshape(-1)
            mask = largest(flat.abs(), self._count(flat.numel()))
            part = flat * mask
            kept.copy_((same_l1(part, flat) if self.rescale == "l1" else part).view_as(whole))
        return trimmed

    def keeps(self, count: int) -> int | None:
        """See the contract; a trim that rescales needs the norms too."""
        return self._count(count) if self.rescale == "none" else None

    def _count(self, count: int) -> int:
        if self.density >= 1:
            return count
        return max(1, int(self.density * count)) if self.density > 0 else 0
