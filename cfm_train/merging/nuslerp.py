"""NuSLERP: SLERP with a vector for each row or column of a matrix, as in mergekit.

The formula is that of `slerp`; a row is what one output reads from all inputs, a column what one
input gives to all outputs. Taken over the whole tensor (``along=all``) it is SLERP without a
threshold.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cfm_train.merging import sphere
from cfm_train.merging.rule import Facts, Rule, shares
from cfm_train.merging.slerp import arc


class NuSlerp(Rule):
    """Spherical interpolation of two updates, part by part.

    Args:
        along: what a vector is: ``rows`` or ``columns`` of a matrix ``[out, in]``, or ``all`` of a
            tensor. A vector is always taken whole.
    """

    matrices = True
    fewest = 2
    most = 2
    needs_base = False
    promises = frozenset({"permutation", "idempotent", "off"})

    def __init__(self, along: Literal["all", "rows", "columns"]) -> None:
        self.along = along

    def combine(self, updates: Tensor, weights: Tensor, facts: Facts) -> Tensor:
        """See the class; t is the second input's share of the weights."""
        if self.along == "all":
            return self.combine_vectors(updates, weights)
        dim = -1 if self.along == "rows" else -2
        t = shares(weights, self.kind)[1]
        one, two = updates.double()
        lengths = one.norm(dim=dim, keepdim=True) * two.norm(dim=dim, keepdim=True)
        product = (one * two).sum(dim, keepdim=True)
        cosine = (product / torch.where(lengths > 0, lengths, 1.0)).clamp(-1, 1)
        first, second = arc(cosine.cpu(), t, 1.0).to(one)
        return (first * one + second * two).to(updates.dtype)

    def combine_vectors(self, updates: Tensor, weights: Tensor) -> Tensor:
        """The tensor as one vector."""
        t = shares(weights, self.kind)[1]
        _, cosines = sphere.directions(updates)
        return sphere.add_up(updates, arc(cosines[0, 1], t, 1.0))
