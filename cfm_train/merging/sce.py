"""SCE: select, calculate, erase (FuseChat, Wan et al. 2024, arXiv 2408.07990).

1. Select: the share ``select_topk`` of numbers that vary most between the updates stay.
2. Calculate: an update weighs its mean square, ``wᵢ = mean(τᵢ²) / Σⱼ mean(τⱼ²)``.
3. Erase: what does not have the sign of ``Σ τᵢ`` is left out, and the rest is averaged by weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfm_train.config.types import Fraction
from cfm_train.merging.rule import Facts, Rule, per_input
from cfm_train.merging.sparsify.sparsifier import largest


class SCE(Rule):
    """Weights come from the updates; it takes none.

    Args:
        select_topk: share, of the numbers that differ between the updates at all, that stays; 1
            for all numbers.
    """

    weightless = True
    fewest = 2
    promises = frozenset({"permutation", "off"})

    def __init__(self, select_topk: Fraction) -> None:
        self.select_topk = select_topk
        if select_topk == 1:  # else nothing stays of updates that do not differ
            self.promises = self.promises | {"idempotent"}

    def combine(self, updates: Tensor, weights: Tensor, facts: Facts) -> Tensor:
        """See the class; a number on which no update agrees is zero."""
        if self.select_topk < 1:
            variance = updates.var(dim=0, unbiased=False).reshape(-1)
            count = int(int(variance.count_nonzero()) * self.select_topk)
            updates = updates * largest(variance, count).view(updates.shape[1:])
        squares = updates.reshape(len(updates), -1).double().square().mean(dim=1)
        if not squares.sum():
            return updates[0].clone()
        share = per_input((squares / squares.sum()).to(updates.dtype), updates)
        elected = torch.where(updates.sum(0) >= 0, 1.0, -1.0).to(updates.dtype)
        agree = updates.sign() == elected
        divisor = (share * agree).sum(0)
        return (updates * share * agree).sum(0) / torch.where(divisor == 0, 1.0, divisor)
