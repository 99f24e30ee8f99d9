"""Iso-CTS: a flat spectrum over the common space and a space for each task (Marczak et al. 2025,
arXiv 2502.04959).

Of the ``r`` directions of ``Σ wᵢτᵢ`` the first ``k`` are common; what an update has outside of
them, ``τᵢ - U_k U_kᵀ τᵢ``, gives its first ``(r-k)/N`` singular triplets. All of them
side by side, their vectors made orthonormal, with the mean of their singular values:

    τ = mean(σ) U⊥ V⊥ᵀ

``k`` is ``common_space_fraction`` of ``r``, rounded so that the rest divides among the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfm_train.config.types import Fraction
from cfm_train.merging.rule import Facts, Rule
from cfm_train.merging.spectrum import orthogonal, rounding, svd


class IsoCTS(Rule):
    """Isotropic merging in common and task-specific spaces; vectors are averaged.

    Args:
        common_space_fraction: share of the sum's directions that is common. λ is ``merge.scale``.
    """

    matrices = True
    multiplies = True
    ranks = True
    promises = frozenset({"permutation", "off"})

    def __init__(self, common_space_fraction: Fraction) -> None:
        self.common_space_fraction = common_space_fraction

    def combine(self, updates: Tensor, weights: Tensor, facts: Facts) -> Tensor:
        """See the class; ``r`` counts singular values that are more than rounding."""
        count, dtype = len(updates), updates.dtype
        weighted = updates.double() * weights.double()[:, None, None]
        noise = rounding(*weighted, dtype=dtype)
        U, S, Vh = svd(weighted.sum(0), noise)
        rank = len(S)
        if not rank:
            return updates.new_zeros(updates.shape[1:])
        common = int(rank * self.common_space_fraction)
        own = min(round((rank - common) / count), rank // count)
        common = rank - own * count
        left, values, right = [U[:, :common]], [S[:common]], [Vh[:common].T]
        for update in weighted:
            rest = update - U[:, :common] @ (U[:, :common].T @ update)
            u, s, vh = svd(rest, noise)
            left.append(u[:, :own])
            values.append(s[:own])
            right.append(vh[:own].T)
        outer = orthogonal(torch.cat(left, dim=1), dtype)
        inner = orthogonal(torch.cat(right, dim=1), dtype)
        return (torch.cat(values).mean() * (outer @ inner.T)).to(dtype)
