"""The bridge in closed form: ridge regression of the top's states on the bottom's, streamed.

    W = (Σ_xx + λ s I)⁻¹ Σ_xy,   b = ȳ - W x̄,   s = mean of the diagonal of Σ_xx

Σ are centred second moments (Hoerl and Kennard 1970). Only sums over tokens are kept, in float64;
every state is first moved by the mean of the first batch, so that a large common offset (residual
streams have one) costs no digits. The intercept is not penalised. λ is chosen on tokens that the
sums have not seen, from their sums alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Moments:
    """Sums over tokens of two sets of states.

    Args:
        like: moments whose origin is taken over, so that both can be compared.

    Attributes:
        count: tokens seen.
        xx, xy, yy: ``[dx, dx]``, ``[dx, dy]`` and ``[dy]`` (its diagonal alone), float64, about the
            origin.
        x, y: sums of the states about the origin.
    """

    def __init__(self, like: Moments | None = None) -> None:
        self.count = 0
        self.origin: tuple[Tensor, Tensor] | None = None if like is None else like.origin

    def add(self, x: Tensor, y: Tensor) -> None:
        """Takes in states ``[tokens, dx]`` and ``[tokens, dy]`` of the same tokens."""
        x, y = x.double(), y.double()
        if self.origin is None:
            self.origin = (x.mean(dim=0), y.mean(dim=0))
        if not self.count:
            dx, dy = x.shape[1], y.shape[1]
            self.xx, self.xy = x.new_zeros(dx, dx), x.new_zeros(dx, dy)
            self.yy, self.x, self.y = x.new_zeros(dy), x.new_zeros(dx), x.new_zeros(dy)
        x, y = x - self.origin[0], y - self.origin[1]
        self.count += len(x)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.square().sum(dim=0)
        self.x += x.sum(dim=0)
        self.y += y.sum(dim=0)

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Mean over tokens of ``|y - W x - b|²``, from the sums.

        Args:
            weight: ``[dy, dx]`` float64.
            bias: ``[dy]`` float64, about the origin.
        """
        product = weight @ self.xy  # [dy, dy]
        total = (
            self.yy.sum()
            + (weight @ self.xx * weight).sum()
            + self.count * bias.square().sum()
            - 2 * product.diagonal().sum()
            - 2 * bias @ self.y
            + 2 * bias @ (weight @ self.x)
        )
        return float(total) / self.count


@dataclass(frozen=True)
class Fit:
    """An affine map between two streams.

    Attributes:
        weight: ``[dy, dx]`` float64.
        bias: ``[dy]`` float64.
        ridge: the λ that was chosen.
        errors: λ -> share of the held-out variance that is left (1 for a constant).
    """

    weight: Tensor
    bias: Tensor
    ridge: float
    errors: dict[float, float]


def solve(train: Moments, held_out: Moments, grid: Sequence[float]) -> Fit:
    """The ridge solution with the λ that does best on held-out tokens; the larger of equals.

    Args:
        train: moments of the tokens to fit.
        held_out: moments of others, about the same origin.
        grid: values of λ, relative to the mean variance of a feature of x; 0 for plain least
            squares (of least norm where features depend on each other).
    """
    assert train.origin is not None
    n = train.count
    mean_x, mean_y = train.x / n, train.y / n
    xx = train.xx / n - torch.outer(mean_x, mean_x)
    xy = train.xy / n - torch.outer(mean_x, mean_y)
    values, vectors = torch.linalg.eigh(xx)
    scale = xx.diagonal().mean()
    tiny = values[-1] * len(values) * torch.finfo(torch.float64).eps
    rotated = vectors.T @ xy
    constant = held_out.error(torch.zeros_like(xy).T, mean_y)
    errors: dict[float, float] = {}
    fits: dict[float, tuple[Tensor, Tensor]] = {}
    for ridge in sorted(set(grid), reverse=True):
        damped = values + ridge * scale
        inverse = torch.where(damped > tiny, 1 / damped.clamp_min(tiny), 0.0)
        weight = (vectors @ (inverse[:, None] * rotated)).T
        bias = mean_y - weight @ mean_x
        fits[ridge] = (weight, bias)
        errors[ridge] = held_out.error(weight, bias) / max(constant, 1e-300)
    best = min(errors, key=lambda ridge: errors[ridge])
    weight, bias = fits[best]
    x0, y0 = train.origin
    return Fit(weight, bias + y0 - weight @ x0, best, errors)
