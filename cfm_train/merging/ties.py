"""TIES: where updates disagree on the sign, the minority is left out (arXiv 2306.01708).

Trimming is the sparsifier's part (``magnitude``), its scope ``merge.scope``, λ ``merge.scale``.
What the name means differs between projects in two more choices, which are arguments here; the
options ``rule=ties/paper``, ``ties/mergekit``, ``ties/peft`` and ``ties/knots`` set all of them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cfm_train.merging.rule import Facts, Rule


class Ties(Rule):
    """Elects a sign for every number, then merges the updates that have it.

    Args:
        elect: the sign of what wins: of the sum of the updates (``total``), of the sum of the
            updates times their weights (``weighted``), or of the sum of their signs
            (``frequency``). A sum of zero elects plus.
        divisor: what the sum of weight times update, over the updates that agree, is divided by:
            how many agree (``count``, the paper's disjoint mean), the sum of their weights
            (``weights``), or nothing (``one``).
    """

    elementwise = True
    promises = frozenset({"identity", "permutation", "off"})

    def __init__(
        self,
        elect: Literal["total", "weighted", "frequency"],
        divisor: Literal["count", "weights", "one"],
    ) -> None:
        self.elect = elect
        self.divisor = divisor
        self.multiplies = divisor != "weights"
        if divisor != "one":
            self.promises = self.promises | {"idempotent"}
        if elect != "weighted":  # w and -w of one number are a tie, which elects plus
            self.promises = self.promises | {"cancel"}

    def combine(self, updates: Tensor, weights: Tensor, facts: Facts) -> Tensor:
        """See the class; a number that no update agrees on is zero.

        One update after the other, the side above zero and the side below apart, in a few tensors
        of one update's size: whole models go through here a piece at a time.
        """
        votes = torch.zeros_like(updates[0])
        above, below = _Side(votes), _Side(votes)
        scratch, part = torch.empty_like(votes), torch.empty_like(votes)
        for update, weight in zip(updates, weights, strict=True):
            torch.mul(update, weight, out=scratch)
            if self.elect != "weighted":
                votes.add_(update.sign() if self.elect == "frequency" else update)
            else:
                votes.add_(scratch)
            decides = scratch if self.elect == "weighted" else update
            for side, bound in ((above, {"min": 0.0}), (below, {"max": 0.0})):
                torch.clamp(decides, **bound, out=part)
                side.total.add_(part if decides is scratch else part * weight)
                if self.divisor != "one":
                    torch.sign(part, out=part)
                    side.divisor.add_(part.mul_(weight) if self.divisor == "weights" else part)
        # Comparisons as numbers 0 and 1: masks of booleans are many times slower on a processor.
        elected = torch.ge(votes, 0, out=scratch)
        total = above.choose(below, elected, "total")
        if self.divisor == "one":
            return total
        divisor = above.choose(below.negative(), elected, "divisor")
        return total.div_(divisor.add_(torch.eq(divisor, 0, out=part)))


class _Side:
    """What the updates on one side of zero add up to."""

    def __init__(self, like: Tensor) -> None:
        self.total = torch.zeros_like(like)
        self.divisor = torch.zeros_like(like)

    def negative(self) -> _Side:
        """Below zero signs are -1, so what they counted is too."""
        self.divisor.neg_()
        return self

    def choose(self, other: _Side, mine: Tensor, what: str) -> Tensor:
        """Its own numbers where ``mine`` is 1, and the other side's where it is 0."""
        own: Tensor = getattr(self, what)
        theirs: Tensor = getattr(other, what)
        return own.mul_(mine).add_(theirs.mul_(1 - mine))
