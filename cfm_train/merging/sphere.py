"""Updates as directions and lengths, for rules that interpolate on the sphere.

What such a rule gives is a weighted sum of its inputs, so it needs nothing of them but their inner
products: one pass over the numbers in float64, then arithmetic on a matrix ``[N, N]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Numbers that are taken to float64 at once.
_CHUNK = 1 << 20


def inner_products(updates: Tensor) -> Tensor:
    """The inner products of ``[N, *shape]`` as flat vectors, ``[N, N]`` float64 on the CPU."""
    flat = updates.reshape(len(updates), -1)
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for part in flat.split(_CHUNK, dim=1):
        wide = part.double()
        total += (wide @ wide.T).cpu()
    return total


def directions(updates: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths ``[N]`` and cosines ``[N, N]`` of updates; 0 for those with an update of zeros."""
    products = inner_products(updates)
    lengths = products.diagonal().sqrt()
    some = torch.where(lengths > 0, lengths, 1.0)
    return lengths, (products / some[:, None] / some[None, :]).clamp(-1, 1)


def add_up(updates: Tensor, coefficients: Tensor) -> Tensor:
    """``Σ cᵢ τᵢ`` in the updates' dtype."""
    return torch.tensordot(coefficients.to(updates), updates, dims=1)
