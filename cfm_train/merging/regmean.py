"""RegMean: the matrix whose outputs are nearest to those of every brick (Jin et al. 2023, arXiv
2212.09849).

    ΔW = (Σ wᵢ ΔWᵢ Gᵢ)(Σ wᵢ Gᵢ)⁻¹        Gᵢ = Σ x xᵀ over the inputs that brick i saw there

The minimum of ``Σ wᵢ Σ_x ‖ΔW x - ΔWᵢ x‖²``. The paper multiplies the off-diagonals of G by
``alpha``, which keeps the inverse tame.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfm_train.config.types import Fraction
from cfm_train.errors import UserError
from cfm_train.merging.fisher import check_positive
from cfm_train.merging.rule import Facts, Rule, shares, weighted_sum


class RegMean(Rule):
    """Least squares over the inputs of all bricks, in float64.

    Args:
        alpha: factor of the off-diagonals of the Gram matrices; 1 for plain least squares.
    """

    matrices = True
    needs = "gram"
    promises = frozenset({"identity", "permutation", "idempotent", "off"})

    def __init__(self, alpha: Fraction) -> None:
        self.alpha = alpha

    def combine(self, updates: Tensor, weights: Tensor, facts: Facts) -> Tensor:
        """See the class. Of inputs that no brick saw the data says nothing: there the solution is
        the weighted mean of the updates.

        Args:
            facts: statistics are Gram matrices ``[in, in]`` for updates ``[out, in]``.

        Raises:
            UserError: a weight is negative, all are zero, or a matrix has another shape.
        """
        check_positive(weights, self.kind)
        wide = updates.double()
        mean = weighted_sum(wide, shares(weights.double(), self.kind))
        above, below = torch.zeros_like(mean), mean.new_zeros(mean.shape[1], mean.shape[1])
        for update, weight, gram in zip(wide, weights.double(), facts.statistics, strict=True):
            if gram.shape != below.shape:
                raise UserError(
                    f"The Gram matrix of '{facts.name}' has the shape {list(gram.shape)}, and its "
                    f"update has {below.shape[0]} inputs: make the statistics anew."
                )
            gram = weight * self._damped(gram.to(below))
            above += (update - mean) @ gram
            below += gram
        # Relative to the mean, the least-norm solution leaves unseen inputs at the mean.
        inverse = torch.linalg.pinv(below, hermitian=True)
        return (mean + above @ inverse).to(updates.dtype)

    def _damped(self, gram: Tensor) -> Tensor:
        diagonal = gram.diagonal()
        return self.alpha * gram + torch.diag((1 - self.alpha) * diagonal)
