"""AdaMerging: weights with which the answers to test inputs are surest (arXiv 2310.02575).

    min over w of  Σ over tasks of the mean entropy of p(· | x; w), x a test input

No label is read, neither to descend nor to choose; but the weights are made for the very inputs
that the figures are of. So a record, a card and a page say "adapts on test inputs", and such a
figure does not compare with one whose weights were chosen on validation rows.

Task-wise, a weight for each brick; layer-wise, for each brick and layer. Adam with the paper's rate
and batch. The paper's weights are 0.3 at first and multiply updates as they are: that is
``recipe=merge/linear weights=[0.3,0.3]``.
"""

from __future__ import annotations

from typing import Literal

from cfm_train.config.types import Positive, Rate
from cfm_train.merging.search.gradient import descend
from cfm_train.merging.search.search import Problem, Proposals, Search


class AdaMerging(Search):
    """Adam on the entropy, from the merge's own weights.

    Args:
        objective: the entropy.
        by: a weight for each brick, or for each brick and layer.
        steps: of Adam.
        every: steps between two points that are compared, by the entropy of all rows.
        batch: rows of each task in a step.
        learning_rate: of Adam.
    """

    chosen_on = "test inputs"
    follows = True
    starts = True

    def __init__(
        self,
        objective: Literal["entropy"],
        by: Literal["brick", "layer"],
        steps: Positive,
        every: Positive,
        batch: Positive,
        learning_rate: Rate,
    ) -> None:
        self.objective = objective
        self.by, self.steps, self.every = by, steps, every
        self.batch, self.learning_rate = batch, learning_rate

    def count(self, problem: Problem) -> int:
        """See the contract."""
        return 1 + -(-self.steps // self.every)

    def propose(self, problem: Problem) -> Proposals:
        """See the class."""
        yield from descend(problem, self.steps, self.every, self.learning_rate)
