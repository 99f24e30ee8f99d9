"""Fisher merging: each number is averaged by how sure every brick is of it (Matena and Raffel 2022,
arXiv 2111.09832).

    τ = Σ wᵢ Fᵢ τᵢ / Σ wᵢ Fᵢ        Fᵢ: diagonal of brick i's Fisher information
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfm_train.config.types import Rate
from cfm_train.errors import UserError
from cfm_train.merging.rule import Facts, Rule, per_input


class Fisher(Rule):
    """The average weighted by Fisher information; where there is none, by the weights alone.

    Args:
        minimum: smaller values of a Fisher diagonal count as this, so that numbers which no data
            speaks for are averaged plainly.
    """

    elementwise = True
    needs = "fisher"
    promises = frozenset({"identity", "permutation", "idempotent", "off"})

    def __init__(self, minimum: Rate) -> None:
        self.minimum = minimum

    def combine(self, updates: Tensor, weights: Tensor, facts: Facts) -> Tensor:
        """See the class.

        Args:
            facts: statistics are Fisher diagonals of the updates' shape.

        Raises:
            UserError: a weight is negative, all are zero, or a diagonal has another shape.
        """
        check_positive(weights, self.kind)
        above, below = torch.zeros_like(updates[0]), torch.zeros_like(updates[0])
        for update, weight, fisher in zip(
            updates, per_input(weights, updates), facts.statistics, strict=True
        ):
            if fisher.shape != update.shape:
                raise UserError(
                    f"The Fisher diagonal of '{facts.name}' has the shape {list(fisher.shape)}, "
                    f"and its update {list(update.shape)}: make the statistics anew."
                )
            sure = weight * fisher.to(update).clamp(min=self.minimum)
            above += sure * update
            below += sure
        return above / below


def check_positive(weights: Tensor, rule: str) -> None:
    """Refuses weights that make no average of statistics.

    Raises:
        UserError: one is negative, or all are zero.
    """
    if bool((weights < 0).any()) or bool((weights.sum(0) <= 0).any()):
        raise UserError(f"rule={rule} takes weights of 0 and more, not all 0.")
