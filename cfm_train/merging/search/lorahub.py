"""LoraHub: a few labelled rows, no gradients, weights kept small (arXiv 2307.13269).

    min over w of  L(Σ wᵢ τᵢ) + α/N Σ |wᵢ|        -1.5 ≤ wᵢ ≤ 1.5, from w = 0

The paper leaves the search to Nevergrad's Shiwa; CMA-ES stands in for it here. The paper writes the
penalty as a sum, but the code that its figures come from (``default_l1_regularization`` in
``lorahub/algorithm.py``, α = 0.05) divides by the number of bricks, and so is it here. The paper
merges A and B one by one, which is ``recipe=merge/linear merge.space=parameters merge.fold=b``.
"""

from __future__ import annotations

from typing import Literal

from cfm_train.config.types import NonNegative, Positive, Rate
from cfm_train.merging.search.cma_es import evolve
from cfm_train.merging.search.search import Point, Problem, Proposals, Search


class LoraHub(Search):
    """CMA-ES from weights of zero with an L1 penalty.

    Args:
        objective: what is compared.
        weights: lowest and highest weight of a brick.
        trials: points in all.
        sigma: the first step, as a share of the range.
        l1: α.
    """

    linear = True

    def __init__(
        self,
        objective: Literal["metric", "loss"],
        weights: list[float],
        trials: Positive,
        sigma: Rate,
        l1: NonNegative,
    ) -> None:
        self.objective = objective
        self.weights, self.trials, self.sigma, self.l1 = weights, trials, sigma, l1

    def count(self, problem: Problem) -> int:
        """See the contract."""
        return self.trials

    def propose(self, problem: Problem) -> Proposals:
        """See the class."""
        yield from evolve(problem, [0.0] * len(problem.axes), self.sigma, self.trials)

    def penalty(self, point: Point) -> float:
        """``α/N Σ |wᵢ|``."""
        return self.l1 * sum(map(abs, point)) / len(point)
