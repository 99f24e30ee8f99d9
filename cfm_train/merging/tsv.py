"""TSV-Merge: task singular vectors, decorrelated (Gargiulo et al. 2025, arXiv 2412.00081).

Of each update ``wᵢτᵢ = UᵢΣᵢVᵢᵀ`` the first ``⌊min(out, in)/N⌋`` triplets stay. The kept vectors of
all inputs side by side are replaced by the nearest orthonormal ones, and multiplied out:

    τ = U⊥ diag(Σ₁ … Σ_N) V⊥ᵀ        U⊥ = nearest([U₁ … U_N]), V⊥ = nearest([V₁ … V_N])
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfm_train.merging.rule import Facts, Rule
from cfm_train.merging.spectrum import orthogonal, rounding, svd


class TSV(Rule):
    """Task singular vectors of every input, made orthogonal to each other; vectors are averaged.

    λ is ``merge.scale``, the paper's α.
    """

    matrices = True
    multiplies = True
    ranks = True
    promises = frozenset({"identity", "permutation", "off"})

    def combine(self, updates: Tensor, weights: Tensor, facts: Facts) -> Tensor:
        """See the class; singular values that are rounding have no vectors to decorrelate."""
        keep = min(updates.shape[1:]) // len(updates)
        left, values, right = [], [], []
        for update, weight in zip(updates.double(), weights.double(), strict=True):
            weighted = weight * update
            U, S, Vh = svd(weighted, rounding(weighted, dtype=updates.dtype))
            left.append(U[:, :keep])
            values.append(S[:keep])
            right.append(Vh[:keep].T)
        U = orthogonal(torch.cat(left, dim=1), updates.dtype)
        V = orthogonal(torch.cat(right, dim=1), updates.dtype)
        return ((U * torch.cat(values)) @ V.T).to(updates.dtype)
