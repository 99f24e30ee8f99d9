"""Iso-C: the sum of the updates with a flat spectrum (Marczak et al. 2025, arXiv 2502.04959).

    Σ wᵢτᵢ = U diag(σ) Vᵀ        τ = mean(σ) U Vᵀ

The mean is over the singular values that are there: of low-rank updates those of the sum's rank,
while the paper, whose updates have full rank, divides by ``min(out, in)``.
"""

from __future__ import annotations

from torch import Tensor

from cfm_train.merging.rule import Facts, Rule, weighted_sum
from cfm_train.merging.spectrum import rounding, svd


class IsoC(Rule):
    """Isotropic merging in the common space; vectors are averaged. λ is ``merge.scale``."""

    matrices = True
    multiplies = True
    promises = frozenset({"permutation", "off"})

    def combine(self, updates: Tensor, weights: Tensor, facts: Facts) -> Tensor:
        """See the class."""
        total = weighted_sum(updates.double(), weights.double())
        noise = weights.abs().sum().item() * rounding(*updates, dtype=updates.dtype)
        U, S, Vh = svd(total, noise)
        if not len(S):
            return updates.new_zeros(updates.shape[1:])
        return (S.mean() * (U @ Vh)).to(updates.dtype)
