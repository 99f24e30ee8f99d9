"""Descending the loss on validation rows: the merge as a function of its weights, by Adam.

A weighted sum of updates is what the bricks do that are plugged together with their weights, so the
gradient is exact and nothing is merged on the way:

    y = W x + λ Σ wᵢ(layer) sᵢ Bᵢ Aᵢ x

One weight for each brick, or one for each brick and layer (as in LoRA Soups, arXiv 2410.13025).
Losses of tasks are not of one size (77 labels begin at log 77, two at log 2), so the mean is
that of each task's loss over its loss at the start.
"""

from __future__ import annotations

from typing import Literal

import torch

from cfm_train.config.types import Positive, Rate
from cfm_train.merging.search.search import Problem, Proposals, Search


class Gradient(Search):
    """Adam on the weights, from the merge's own.

    Args:
        objective: by what the best point on the way is chosen; it is the loss that is descended.
        by: a weight for each brick, or for each brick and layer.
        balance: whether each task's loss counts as a share of its loss at the start.
        steps: of Adam.
        every: steps between two points that are compared.
        batch: rows of each task in a step.
        learning_rate: of Adam.
    """

    follows = True
    starts = True

    def __init__(
        self,
        objective: Literal["loss", "metric"],
        by: Literal["brick", "layer"],
        balance: bool,
        steps: Positive,
        every: Positive,
        batch: Positive,
        learning_rate: Rate,
    ) -> None:
        self.objective = objective
        self.by, self.balance = by, balance
        self.steps, self.every = steps, every
        self.batch, self.learning_rate = batch, learning_rate

    def count(self, problem: Problem) -> int:
        """See the contract."""
        return 1 + -(-self.steps // self.every)

    def propose(self, problem: Problem) -> Proposals:
        """See the class: the start, every so many steps a point, and the last one."""
        yield from descend(problem, self.steps, self.every, self.learning_rate)


def descend(problem: Problem, steps: int, every: int, learning_rate: float) -> Proposals:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) along the problem's slope.

    Args:
        problem: with a slope.
        steps: of Adam.
        every: steps between two proposals.
        learning_rate: of Adam.
    """
    assert problem.slope is not None
    start = torch.tensor(problem.start, dtype=torch.float64)
    weights = start.view(problem.bricks, -1).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=learning_rate)
    yield weights.detach().flatten().tolist()
    for step in range(steps):
        optimizer.zero_grad()
        problem.slope(weights, step)
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            yield weights.detach().flatten().tolist()
