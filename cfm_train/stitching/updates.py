"""Affine low-rank updates of a linear site and how they compose; float64, rounded at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cfm_train.bricks.bank import LowRank


@dataclass(frozen=True)
class Update:
    """What low-rank bricks add to a site's output, ``x ↦ B A x + c``.

    Attributes:
        A: ``[rank, in_features]`` float64.
        B: ``[out_features, rank]`` float64, scales in it.
        c: ``[out_features]`` float64; None for zero.
    """

    A: Tensor
    B: Tensor
    c: Tensor | None

    def beside(self, other: Update) -> Update:
        """``x ↦ b₁(x) + b₂(x)``, rank r₁ + r₂."""
        return Update(
            torch.cat([self.A, other.A]), torch.cat([self.B, other.B], 1), _plus(self.c, other.c)
        )

    def piped(self, second: Update) -> Update:
        """``x ↦ b₂(b₁(x))``, rank r₁."""
        return Update(
            self.A, second.B @ (second.A @ self.B), _plus(second.linear(self.c), second.c)
        )

    def chained(self, second: Update) -> Update:
        """``x ↦ b₁(x) + b₂(x + b₁(x))``, rank r₁ + r₂."""
        A = torch.cat([self.A, second.A + (second.A @ self.B) @ self.A])
        B = torch.cat([self.B, second.B], 1)
        return Update(A, B, _plus(_plus(self.c, second.c), second.linear(self.c)))

    def linear(self, x: Tensor | None) -> Tensor | None:
        """``B A x`` for one vector ``[in_features]``."""
        return None if x is None else self.B @ (self.A @ x)

    def plug(self, site: str, brick: nn.Module) -> LowRank:
        """The update as a plug of the bank, float32."""
        return LowRank(
            site=site,
            A=self.A.float(),
            B=self.B.float(),
            scale=1.0,
            dropout=0.0,
            magnitude=None,
            bias=None if self.c is None else self.c.float(),
            bias_replaces=False,
            brick=brick,
        )


def update_of(plugs: Sequence[LowRank]) -> Update:
    """What plain low-rank plugs of one site add to its output together.

    Args:
        plugs: at least one; none with a magnitude or a bias that replaces the module's own.
    """
    total: Update | None = None
    for plug in plugs:
        bias = None if plug.bias is None else plug.bias.double() * plug.scale
        one = Update(plug.A.double(), plug.B.double() * plug.scale, bias)
        total = one if total is None else total.beside(one)
    assert total is not None
    return total


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other
