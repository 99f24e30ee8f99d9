"""Model Breadcrumbs: drop outliers and small numbers, keep those between (Davari and Belilovsky
2024, arXiv 2312.06795)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cfm_train.config.types import Fraction
from cfm_train.merging.sparsify.sparsifier import Sparsifier, largest, same_l1


class Breadcrumbs(Sparsifier):
    """Drops the ``⌊gamma · n⌋`` largest numbers of each input's ``n``, keeps the next
    ``max(1, ⌊density · n⌋)``, drops the rest.

    Where not so many are left below the outliers, fewer outliers are dropped. Of numbers with equal
    magnitude the first by position counts as the larger.

    Args:
        density: share that is kept, 0 to 1; 1 keeps outliers too.
        gamma: share of outliers, 0 to 1.
        rescale: ``l1`` gives what is left the L1 norm of the whole, ``none`` leaves it.
    """

    def __init__(self, density: Fraction, gamma: Fraction, rescale: Literal["none", "l1"]) -> None:
        self.density = density
        self.gamma = gamma
        self.rescale = rescale

    def sparsify(self, updates: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """See the class."""
        if self.density >= 1:
            return updates
        trimmed = torch.zeros_like(updates)
        for whole, kept in zip(updates, trimmed, strict=True):
            flat = whole.reshape(-1)
            count = max(1, int(self.density * flat.numel())) if self.density > 0 else 0
            outliers = min(int(self.gamma * flat.numel()), flat.numel() - count)
            magnitudes = flat.abs()
            mask = largest(magnitudes, outliers + count) & ~largest(magnitudes, outliers)
            part = flat * mask
            kept.copy_((same_l1(part, flat) if self.rescale == "l1" else part).view_as(whole))
        return trimmed
