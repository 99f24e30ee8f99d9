"""The parallel sum: every brick sees the same h, and all contributions are added.

    h ← h + b₁(h) + b₂(h) + …

At a linear site (LoRA) it is ``y = W x + Σ sᵢBᵢAᵢx``: what PEFT computes for
``set_adapter([a, b])``, and again a low-rank update, of rank Σ rᵢ. Bricks whose contribution does
not depend on the output that it joins (DoRA, parallel adapters, biases) may meet there too. A brick
that does not act on a site contributes nothing there. The order does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cfm_train.stitching.mode import Mode

if TYPE_CHECKING:
    from torch import Tensor


class Sum(Mode):
    """``h ← h + Σ bᵢ(h)``."""

    ordered = False
    subtracts = True
    meets = (
        frozenset({"linear", "fixed", "added"}),
        frozenset({"output"}),
        frozenset({"input"}),
    )
    side_by_side = frozenset({"linear", "fixed", "added"})

    def states(self, h: Tensor, maps: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        """h and every contribution to it."""
        total = h
        for each in maps:
            total = total + (each(h) - h)
        return total
