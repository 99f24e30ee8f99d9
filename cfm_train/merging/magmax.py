"""MagMax: of every number the one of largest magnitude (Marczak et al. 2024, arXiv 2407.06322).

τ = λ τ_k where k = argmax |τᵢ|, number by number
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfm_train.merging.rule import Facts, Rule


class MagMax(Rule):
    """The largest number wins; λ is ``merge.scale``. It takes no weights."""

    weightless = True
    elementwise = True
    promises = frozenset({"identity", "permutation", "idempotent", "off"})

    def combine(self, updates: Tensor, weights: Tensor, facts: Facts) -> Tensor:
        """See the class; of two that are opposite and equally large the positive one wins."""
        high, low = updates.amax(0), updates.amin(0)
        return torch.where(high >= -low, high, low)
