"""TIES: where updates disagree on the sign, the minority is left out (arXiv 2306.01708).

Trimming is the sparsifier's part (``magnitude``), its scope ``merge.scope``, λ ``merge.scale``.
What the name means differs between projects in two more choices, which are arguments here; the
options ``rule=ties/paper``, ``ties/mergekit``, ``ties/peft`` and ``ties/knots`` set all of them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cfm_train.merging.rule import Facts, Rule, per_input


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
        """See the class; a number that no update agrees on is zero."""
        weights = per_input(weights, updates)
        weighted = updates * weights
        signs = (weighted if self.elect == "weighted" else updates).sign()
        votes = {"total": updates, "weighted": weighted, "frequency": signs}[self.elect].sum(0)
        elected = torch.where(votes >= 0, 1.0, -1.0).to(updates.dtype)
        agree = signs == elected
        total = (weighted * agree).sum(0)
        if self.divisor == "one":
            return total
        if self.divisor == "count":
            return total / agree.sum(0).clamp(min=1)
        divisor = (weights * agree).sum(0)
        return total / torch.where(divisor == 0, 1.0, divisor)
