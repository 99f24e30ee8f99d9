"""TALL masks: keep what still speaks for its own task in the sum of all (Wang et al. 2024, arXiv
2405.07813).

    mask_t = |τ_t| > threshold · |Σᵢ τᵢ - τ_t|

With ``agree`` a number stays in every update or in none: *consensus* merging drops what fewer tasks
than that use (``agree: 2`` drops what no task uses and what one alone uses).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cfm_train.config.types import NonNegative, Positive
from cfm_train.merging.sparsify.sparsifier import Sparsifier


class Tall(Sparsifier):
    """Masks from all updates together.

    Args:
        threshold: the paper's λ_t; a larger one keeps less.
        agree: how many tasks must use a number; None gives each update its own mask.
    """

    elementwise = True

    def __init__(self, threshold: NonNegative, agree: Positive | None) -> None:
        self.threshold = threshold
        self.agree = agree

    def sparsify(self, updates: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """See the class.

        The sum is taken of the updates as they are, whatever weights a rule gives them later.
        """
        total = updates.sum(0)
        masks = updates.abs() > self.threshold * (total - updates).abs()
        if self.agree is not None:
            masks = (masks.sum(0) >= self.agree).expand_as(updates)
        return updates * masks
