"""DARE: drop numbers at random and rescale the rest (Yu et al. 2024, arXiv 2311.03099)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cfm_train.config.types import Fraction
from cfm_train.merging.sparsify.sparsifier import Sparsifier, same_l1


class Dare(Sparsifier):
    """Keeps each number with probability ``density``.

    Args:
        density: probability of being kept, 0 to 1.
        rescale: ``inverse`` divides what is left by the density, as the paper does (the expected
            update is then the whole one); ``l1`` gives it the L1 norm of the whole, as mergekit
            does; ``none`` leaves it.
    """

    random = True

    def __init__(self, density: Fraction, rescale: Literal["inverse", "l1", "none"]) -> None:
        self.density = density
        self.rescale = rescale

    def sparsify(self, updates: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """See the class."""
        if self.density >= 1:
            return updates
        result = torch.empty_like(updates)
        for whole, kept, generator in zip(updates, result, generators, strict=True):
            drawn = torch.rand(whole.shape, generator=generator).to(whole.device)
            part = whole * (drawn < self.density)
            if self.rescale == "inverse" and self.density > 0:
                part = part / self.density
            kept.copy_(same_l1(part, whole) if self.rescale == "l1" else part)
        return result
