"""Linear CKA between the layers of two models (Kornblith et al. 2019, arXiv 1905.00414).

    CKA(X, Y) = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),   K = X Xᵀ, L = Y Yᵀ

with the unbiased estimator of Song et al. (2012), K̃ and L̃ with zero diagonals, n tokens:

    HSIC₁ = [tr(K̃ L̃) + (1ᵀK̃1)(1ᵀL̃1) / ((n-1)(n-2)) - 2 (1ᵀK̃L̃1) / (n-2)] / (n (n-3))

averaged over blocks of tokens before the division (Nguyen et al. 2021, arXiv 2010.15327). Without
the correction, wide layers look alike on few tokens; with it a value may fall slightly below 0.
All in float64; memory is that of one block, whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Tokens of one block: enough for the estimator, n² numbers for each layer.
BLOCK = 256


class CKA:
    """Accumulates HSIC between all states of one model and all states of another."""

    def __init__(self) -> None:
        self.blocks = 0
        self._cross: Tensor | float = 0.0
        self._own: tuple[Tensor | float, Tensor | float] = (0.0, 0.0)

    def add(self, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
        """Takes in the states of one block of tokens.

        Args:
            xs: per state of the first model ``[n, width]``, n of at least 4.
            ys: per state of the second ``[n, width]``, of the same tokens.
        """
        one, other = _kernels(xs), _kernels(ys)
        self._cross = self._cross + _hsic(one, other)
        self._own = (
            self._own[0] + _hsic(one, one).diagonal(),
            self._own[1] + _hsic(other, other).diagonal(),
        )
        self.blocks += 1

    def matrix(self) -> list[list[float]]:
        """CKA of each state of the first model (rows) with each of the second (columns).

        A state whose own HSIC is not positive (a constant one) has 0 with every other.
        """
        assert isinstance(self._cross, Tensor)
        a, b = (torch.as_tensor(own).clamp_min(0) for own in self._own)
        bottom = torch.sqrt(torch.outer(a, b))
        values = torch.where(bottom > 0, self._cross / bottom.clamp_min(1e-300), 0.0)
        return [[float(v) for v in row] for row in values]


def _kernels(states: Sequence[Tensor]) -> Tensor:
    """Gram matrices with zero diagonals, ``[states, n, n]`` float64.

    States are centred first: that changes no value of HSIC₁ and keeps its digits.
    """
    found = []
    for state in states:
        x = state.double()
        x = x - x.mean(dim=0)
        kernel = x @ x.T
        kernel.fill_diagonal_(0)
        found.append(kernel)
    return torch.stack(found)


def _hsic(ks: Tensor, ls: Tensor) -> Tensor:
    """HSIC₁ of every pair, ``[states of ks, states of ls]``."""
    n = ks.shape[1]
    rows_k, rows_l = ks.sum(dim=2), ls.sum(dim=2)  # [states, n]
    sums_k, sums_l = rows_k.sum(dim=1), rows_l.sum(dim=1)
    trace = ks.flatten(1) @ ls.flatten(1).T
    means = torch.outer(sums_k, sums_l) / ((n - 1) * (n - 2))
    mixed = 2 * (rows_k @ rows_l.T) / (n - 2)
    return (trace + means - mixed) / (n * (n - 3))


def choose(matrix: Sequence[Sequence[float]], depth: Sequence[int] | None) -> tuple[int, int]:
    """The stitch point of highest CKA.

    Args:
        matrix: CKA of states 0 … of the bottom (rows) with states 0 … of the top (columns); a model
            of L layers has L + 1 states.
        depth: fewest and most layers of the stitched model; None for any.

    Returns:
        (i, j): the bottom's layers 0 … i-1 run (one at least), then the top's from j on (one at
        least). Of equal pairs the one with the lowest i, then j.

    Raises:
        ValueError: no pair has such a depth.
    """
    bottom, top = len(matrix) - 1, len(matrix[0]) - 1
    low, high = depth or (2, bottom + top)
    pairs = [(i, j) for i in range(1, bottom + 1) for j in range(top) if low <= i + top - j <= high]
    return max(pairs, key=lambda pair: matrix[pair[0]][pair[1]])
