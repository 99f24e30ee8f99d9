"""Task arithmetic: the updates are added up and scaled (Ilharco et al. 2022, arXiv 2212.04089).

τ = λ Σ wᵢ τᵢ
"""

from __future__ import annotations

from torch import Tensor

from cfm_train.merging.rule import Facts, Rule, weighted_sum


class TaskArithmetic(Rule):
    """The sum of the updates; λ is ``merge.scale``."""

    linear = True
    multiplies = True
    elementwise = True
    promises = frozenset({"identity", "permutation", "cancel", "off"})

    def combine(self, updates: Tensor, weights: Tensor, facts: Facts) -> Tensor:
        """See the class."""
        return weighted_sum(updates, weights)
