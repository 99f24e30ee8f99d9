"""Karcher mean: the point of the sphere whose squared angles to all updates add up to least.

From the mean direction ``m`` on, repeated until it stands still (arXiv 2603.04972):

    v = Σ αᵢ θᵢ/sinθᵢ (uᵢ - cosθᵢ m)        uᵢ = τᵢ/‖τᵢ‖, θᵢ the angle from m to uᵢ, Σ αᵢ = 1
    m ← cos‖v‖ m + sin‖v‖ v/‖v‖             τ = (Σ αᵢ‖τᵢ‖) m

``m`` stays in the span of the directions, so the iteration runs on its ``N`` coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfm_train.config.types import Positive, Rate
from cfm_train.errors import UserError
from cfm_train.merging import sphere
from cfm_train.merging.fisher import check_positive
from cfm_train.merging.rule import Facts, Rule, shares


class Karcher(Rule):
    """The Riemannian mean of directions, at the weighted mean of lengths.

    Args:
        max_iter: steps after which an iteration that still moves is given up.
        tolerance: length of a step, in radians, at which it stands still.
    """

    needs_base = False
    promises = frozenset({"identity", "permutation", "idempotent", "off"})

    def __init__(self, max_iter: Positive, tolerance: Rate) -> None:
        self.max_iter = max_iter
        self.tolerance = tolerance

    def combine(self, updates: Tensor, weights: Tensor, facts: Facts) -> Tensor:
        """See the class; an update of zeros has length 0 and no direction.

        Raises:
            UserError: a weight is negative, the directions cancel, or the iteration does not come
                to rest.
        """
        check_positive(weights, self.kind)
        share = shares(weights, self.kind).double().cpu()
        lengths, cosines = sphere.directions(updates)
        some = lengths > 0
        if not bool(some.any()):
            return updates[0].clone()
        alpha = share * some
        if not alpha.sum():
            raise UserError(f"rule={self.kind}: what is not zero at '{facts.name}' weighs nothing.")
        mean = self._mean(alpha / alpha.sum(), cosines, facts.name)
        coefficients = some * mean / lengths.clamp(min=1e-300)
        return sphere.add_up(updates, coefficients * (share @ lengths))

    def _mean(self, alpha: Tensor, cosines: Tensor, name: str) -> Tensor:
        """Coefficients ``[N]`` of the mean's direction over those of the inputs."""
        length = (alpha @ cosines @ alpha).clamp(min=0).sqrt()
        if length < 1e-8:
            raise UserError(
                f"rule={self.kind}: the directions of the updates at '{name}' cancel, so they have "
                "no mean: use rule=linear."
            )
        mean = alpha / length
        for _ in range(self.max_iter):
            cosine = (cosines @ mean).clamp(-1, 1)
            angle = cosine.acos()
            # θ/sinθ goes to 1 at 0; at π the way to the update has no direction.
            pull = alpha / torch.special.sinc(angle / torch.pi).clamp(min=1e-12)
            step = pull - (pull @ cosine) * mean
            size = (step @ cosines @ step).clamp(min=0).sqrt()
            if size < self.tolerance:
                return mean
            mean = size.cos() * mean + size.sin() * step / size
            mean = mean / (mean @ cosines @ mean).sqrt()
        raise UserError(
            f"rule={self.kind} does not come to rest at '{name}' in {self.max_iter} steps: raise "
            "merge.max_iter, or use rule=multislerp."
        )
