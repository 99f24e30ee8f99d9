"""The pipe: each brick is fed with what the one before it contributes, and with nothing else.

    h ← h + b₂(b₁(h))

At a linear site (LoRA) h is the site's input: ``y = W x + b₂(b₁(x))``, which needs a site as wide
as its input, and is again a low-rank update, of rank r₁:

    A = A₁,  B = s₂B₂ (A₂ s₁B₁)

At a site's output (adapters, IA3) h is that output. A brick's own contribution reaches the result
only through the next one. A brick that is absent from a site would have to be dropped there or to
let the others through, and neither is what a pipe means, so every brick must act on every site.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING

from cfm_train.stitching.mode import Mode

if TYPE_CHECKING:
    from torch import Tensor

    from cfm_train.stitching.updates import Update


class Pipe(Mode):
    """``h ← h + b₂(b₁(h))``."""

    everywhere = True
    square = True
    subtracts = True
    meets = (frozenset({"linear"}), frozenset({"output"}), frozenset({"input"}))

    def updates(self, found: Sequence[Update]) -> Update:
        """``bₙ∘…∘b₁``."""
        return reduce(lambda first, second: first.piped(second), found)

    def states(self, h: Tensor, maps: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        """h and the last contribution; each map gives its argument plus the contribution."""
        value = h
        for each in maps:
            value = each(value) - value
        return h + value
