"""Singular value decompositions for rules that work on the spectrum of updates.

Low-rank updates have few singular values; the others are rounding, and their vectors point
anywhere. A rule that treats all directions alike would blow them up, so they are left out here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rounding(*parts: Tensor, dtype: torch.dtype) -> float:
    """An upper bound of what rounding to a dtype adds to the singular values of a sum.

    Args:
        *parts: the summands.
        dtype: the dtype that the summands came in.
    """
    return torch.finfo(dtype).eps * sum(part.double().norm().item() for part in parts)


def svd(matrix: Tensor, above: float) -> tuple[Tensor, Tensor, Tensor]:
    """The part of a decomposition whose singular values are larger than ``above``.

    Args:
        matrix: ``[out, in]`` float64.
        above: see `rounding`.

    Returns:
        ``U`` ``[out, k]``, ``S`` ``[k]`` falling, ``Vh`` ``[k, in]``.
    """
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    some = above < S
    return U[:, some], S[some], Vh[some]


def orthogonal(columns: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest matrix with orthonormal columns (orthogonal Procrustes, Schönemann 1966).

    Columns that coincide share one direction: singular values that are zero up to rounding stay
    zero, where they have no nearest direction.

    Args:
        columns: ``[n, k]`` float64, of unit length.
        dtype: the dtype that the matrices whose directions these are came in.
    """
    U, S, Vh = torch.linalg.svd(columns, full_matrices=False)
    some = torch.finfo(dtype).eps ** 0.5 < S
    return U[:, some] @ Vh[some]
