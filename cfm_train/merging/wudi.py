"""WUDI: the update that disturbs every input least where that input acts (Cheng et al. 2025, arXiv
2503.08099).

    min over τ of  Σ ‖(τ - τᵢ) τᵢᵀ‖² / ‖τᵢ‖²

The rows of ``τᵢ`` span the inputs that it was trained on, so no data is needed. The loss is
quadratic, and its minimum nearest to ``Σ τᵢ`` is

    τ = (Σ τᵢ Gᵢ)(Σ Gᵢ)⁺        Gᵢ = τᵢᵀτᵢ / ‖τᵢ‖²

The paper takes 300 steps of Adam from ``Σ τᵢ`` instead, which stop on the way; how far they get
depends on how large the updates are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfm_train.config.types import Positive, Rate
from cfm_train.merging.rule import Facts, Rule

#: Adam's own constants (Kingma and Ba 2015, arXiv 1412.6980), which the paper leaves as they are.
_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


class Wudi(Rule):
    """Least interference between updates, matrix by matrix; vectors are averaged.

    It takes no weights.

    Args:
        steps: of Adam; None for the minimum itself.
        learning_rate: of Adam.
    """

    weightless = True
    matrices = True
    promises = frozenset({"identity", "permutation", "off"})

    def __init__(self, steps: Positive | None, learning_rate: Rate) -> None:
        self.steps = steps
        self.learning_rate = learning_rate
        if steps is None:  # Adam starts at the sum, twice the update
            self.promises = self.promises | {"idempotent"}

    def combine(self, updates: Tensor, weights: Tensor, facts: Facts) -> Tensor:
        """See the class; in float64. An update of zeros asks for nothing."""
        some = torch.stack([one for one in updates.double() if one.any()] or [updates[0].double()])
        # One update alone is the minimum; Adam would scale the rounding of its gradient up.
        if len(some) == 1:
            return some[0].to(updates.dtype)
        merged = minimum(some, updates.dtype) if self.steps is None else self._descend(some)
        return merged.to(updates.dtype)

    def _descend(self, updates: Tensor) -> Tensor:
        assert self.steps is not None
        squares = updates.square().sum((1, 2), keepdim=True)
        grams = updates.mT @ updates / squares
        total, target = grams.sum(0), (updates @ grams).sum(0)
        merged = updates.sum(0)
        first, second = torch.zeros_like(merged), torch.zeros_like(merged)
        for step in range(1, self.steps + 1):
            gradient = 2 * (merged @ total - target)
            first = _BETAS[0] * first + (1 - _BETAS[0]) * gradient
            second = _BETAS[1] * second + (1 - _BETAS[1]) * gradient.square()
            mean, size = first / (1 - _BETAS[0] ** step), second / (1 - _BETAS[1] ** step)
            merged = merged - self.learning_rate * mean / (size.sqrt() + _EPSILON)
        return merged


def minimum(updates: Tensor, dtype: torch.dtype) -> Tensor:
    """The minimum of the loss, ``[out, in]``.

    Args:
        updates: ``[N, out, in]`` float64, none of them zero.
        dtype: what they were before: directions as small as its rounding are left out.
    """
    lengths = updates.reshape(len(updates), -1).norm(dim=1)
    units = updates / lengths[:, None, None]
    # The rows of all updates span the inputs that count: Σ Gᵢ = Q S² Qᵀ. Squaring nothing before
    # the decomposition keeps small directions apart from rounding.
    _, S, Qh = torch.linalg.svd(units.reshape(-1, units.shape[-1]), full_matrices=False)
    some = torch.finfo(dtype).eps * len(updates) ** 0.5 < S
    S, Qh = S[some], Qh[some]
    inside = units @ Qh.T  # [N, out, k]
    target = (lengths[:, None, None] * inside @ (inside.mT @ inside)).sum(0)
    return (target / S.square()) @ Qh
