"""Multi-SLERP: the mean direction of any number of updates, at their mean length.

    τ = (Σ wᵢ‖τᵢ‖) m/‖m‖        m = Σ wᵢ τᵢ/‖τᵢ‖,  Σ wᵢ = 1

mergekit writes it with a step in the tangent space at m; the step is zero, since the weighted sum
of the directions points along m itself, so this is what it computes. For two inputs of equal weight
it is the Karcher mean; SLERP differs in the length.
"""

from __future__ import annotations

from torch import Tensor

from cfm_train.errors import UserError
from cfm_train.merging import sphere
from cfm_train.merging.rule import Facts, Rule, shares


class MultiSlerp(Rule):
    """Weighted mean of directions times weighted mean of lengths, each update as one vector."""

    needs_base = False
    promises = frozenset({"identity", "permutation", "idempotent", "off"})

    def combine(self, updates: Tensor, weights: Tensor, facts: Facts) -> Tensor:
        """See the class; an update of zeros has length 0 and no direction.

        Raises:
            UserError: the weighted directions cancel.
        """
        share = shares(weights, self.kind).double().cpu()
        lengths, cosines = sphere.directions(updates)
        if not bool((lengths > 0).any()):
            return updates[0].clone()
        mean = (share @ cosines @ share).clamp(min=0).sqrt()
        if mean < 1e-8:
            raise UserError(
                f"rule={self.kind}: the directions of the updates at '{facts.name}' cancel, so "
                "they have no mean direction: give other weights, or use rule=linear."
            )
        units = (lengths > 0) * share / lengths.clamp(min=1e-300)
        return sphere.add_up(updates, units * (share @ lengths) / mean)
