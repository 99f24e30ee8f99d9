"""Weighted averaging: the sum of the updates, each times its weight.

    τ = Σ wᵢ τᵢ

With equal weights it is a uniform soup (Wortsman et al. 2022, arXiv 2203.05482).
"""

from __future__ import annotations

from torch import Tensor

from cfm_train.merging.rule import Facts, Rule, weighted_sum


class Linear(Rule):
    """The weighted sum."""

    linear = True
    multiplies = True
    elementwise = True
    needs_base = False
    promises = frozenset({"identity", "permutation", "cancel", "idempotent", "off"})

    def combine(self, updates: Tensor, weights: Tensor, facts: Facts) -> Tensor:
        """See the class."""
        return weighted_sum(updates, weights)
