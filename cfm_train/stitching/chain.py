"""The residual chain: each brick sees what the bricks before it made.

    h ← h + b₁(h);  h ← h + b₂(h);  …

At a linear site (LoRA) h is the site's input x, and what the chain adds to it is put through as the
site's update:

    y = W x + [(id + b₂)∘(id + b₁) − id](x) = W x + b₁(x) + b₂(x + b₁(x)),      bᵢ(x) = sᵢBᵢAᵢx

which needs a site as wide as its input, and is again a low-rank update, of rank r₁ + r₂:

    A = [A₁; A₂ (I + s₁B₁A₁)],  B = [s₁B₁, s₂B₂]

At a site's output (adapters, IA3) h is that output. A brick that does not act on a site is the
identity there, so order matters only where bricks meet, and downstream of nothing but that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING

from cfm_train.stitching.mode import Mode

if TYPE_CHECKING:
    from torch import Tensor

    from cfm_train.stitching.updates import Update


class Chain(Mode):
    """``h ← h + b₁(h)``, then ``h ← h + b₂(h)``."""

    square = True
    meets = (frozenset({"linear"}), frozenset({"output"}), frozenset({"input"}))

    def updates(self, found: Sequence[Update]) -> Update:
        """``(id + bₙ)∘…∘(id + b₁) − id``."""
        return reduce(lambda first, second: first.chained(second), found)

    def states(self, h: Tensor, maps: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        """Each map after the one before it."""
        for each in maps:
            h = each(h)
        return h
