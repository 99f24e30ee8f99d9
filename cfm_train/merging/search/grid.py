"""Grid search: every combination of the values given, the last axis fastest."""

from __future__ import annotations

import itertools
from typing import Literal

from cfm_train.config.types import Positive
from cfm_train.merging.search.search import Problem, Proposals, Search


class Grid(Search):
    """Tries everything.

    Args:
        objective: what is compared.
        weights: the values tried for each brick's weight; None leaves the weights alone.
        space: the values tried for other numbers of the merge.
        most: more combinations are refused.
    """

    def __init__(
        self,
        objective: Literal["metric", "loss"],
        weights: list[float] | None,
        space: dict[str, list[float]],
        most: Positive,
    ) -> None:
        self.objective = objective
        self.weights, self.space, self.most = weights, space, most

    def count(self, problem: Problem) -> int:
        """See the contract."""
        return sum(1 for _ in self._points(problem))

    def propose(self, problem: Problem) -> Proposals:
        """See the class."""
        yield from self._points(problem)

    def _points(self, problem: Problem) -> Proposals:
        for point in itertools.product(*(axis.values for axis in problem.axes)):
            if not problem.skips(point):
                yield point
