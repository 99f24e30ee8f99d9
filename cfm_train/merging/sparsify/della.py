"""DELLA: drop numbers at random, small ones more often (MAGPRUNE, Deep et al. 2024, arXiv
2406.11617)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cfm_train.config.types import Fraction
from cfm_train.merging.sparsify.sparsifier import Sparsifier, same_l1


class Della(Sparsifier):
    """Keeps each number with a probability that grows with its rank in its row ``[..., in]``.

    From ``density - epsilon`` for the smallest magnitude of a row to ``density + epsilon`` for the
    largest, in even steps; a vector is one row. Of equal magnitudes the first by position counts as
    the smaller.

    Args:
        density: mean probability of being kept, 0 to 1.
        epsilon: half the width of the window (the paper's ε is the whole width).
        rescale: ``inverse`` divides each number by its own probability, as the paper does (the
            expected update is then the whole one); ``l1`` gives what is left the L1 norm of the
            whole, as mergekit does; ``none`` leaves it.
    """

    random = True
    rows = True

    def __init__(
        self, density: Fraction, epsilon: Fraction, rescale: Literal["inverse", "l1", "none"]
    ) -> None:
        self.density = density
        self.epsilon = epsilon
        self.rescale = rescale

    def sparsify(self, updates: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """See the class."""
        if self.density >= 1:
            return updates
        result = torch.zeros_like(updates)
        if self.density <= 0:
            return result
        for whole, kept, generator in zip(updates, result, generators, strict=True):
            chance = self.chances(whole)
            drawn = torch.rand(whole.shape, generator=generator).to(whole.device)
            part = whole * (drawn < chance)
            if self.rescale == "inverse":
                part = part / chance
            kept.copy_(same_l1(part, whole) if self.rescale == "l1" else part)
        return result

    def chances(self, update: Tensor) -> Tensor:
        """The probabilities of being kept, in the shape and dtype of one update."""
        width = update.shape[-1]
        order = update.abs().argsort(dim=-1, stable=True)
        steps = torch.linspace(-1, 1, width, dtype=update.dtype, device=update.device)
        if width == 1:
            steps = steps.zero_()
        return self.density + self.epsilon * torch.zeros_like(update).scatter_(
            -1, order, steps.expand_as(update)
        )
