"""CMA-ES: a normal distribution that moves to where points are good, and takes their shape.

Hansen 2016, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772; names and numbers of
equations are its own. Points outside of the bounds are moved to their border, and their distance to
it is added to the cost (its B.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from cfm_train.config.types import Positive, Rate
from cfm_train.merging.search.search import Problem, Proposals, Search


class CmaEs(Search):
    """Evolves the weights, from the merge's own.

    Args:
        objective: what is compared.
        weights: lowest and highest weight of a brick; None leaves the weights alone.
        space: bounds of other numbers of the merge.
        trials: points in all.
        sigma: the first step, as a share of each range.
    """

    starts = True

    def __init__(
        self,
        objective: Literal["metric", "loss"],
        weights: list[float] | None,
        space: dict[str, list[float]],
        trials: Positive,
        sigma: Rate,
    ) -> None:
        self.objective = objective
        self.weights, self.space = weights, space
        self.trials, self.sigma = trials, sigma

    def count(self, problem: Problem) -> int:
        """See the contract."""
        return self.trials

    def propose(self, problem: Problem) -> Proposals:
        """See the class; all axes are brought to the range from 0 to 1."""
        yield from evolve(problem, problem.start, self.sigma, self.trials)


def evolve(problem: Problem, start: Sequence[float], sigma: float, trials: int) -> Proposals:
    """CMA-ES on a problem's axes.

    Args:
        problem: axes with bounds, and the seed.
        start: the first mean; moved into the bounds.
        sigma: the first standard deviation, as a share of each range.
        trials: points in all.
    """
    low = np.array([axis.values[0] for axis in problem.axes])
    size = np.array([axis.values[-1] for axis in problem.axes]) - low
    mean = np.clip((np.asarray(start, dtype=float) - low) / size, 0, 1)
    strategy = Strategy(mean, sigma, np.random.default_rng(problem.seed))
    left = trials
    # The start itself is the first point: what is found is never worse than what was there.
    yield (low + size * mean).tolist()
    left -= 1
    while left:
        drawn = strategy.draw()
        costs = []
        for point in drawn[:left]:
            inside = np.clip(point, 0, 1)
            cost = yield (low + size * inside).tolist()
            costs.append(cost + float(np.square(point - inside).sum()))
        left -= len(costs)
        if len(costs) == len(drawn):  # a generation that was cut short teaches nothing
            strategy.learn(drawn, costs)


class Strategy:
    """The distribution N(m, σ²C), and how it learns (figure 6 and table 1).

    Args:
        mean: m, ``[n]``.
        sigma: σ.
        generator: draws the points.
    """

    def __init__(self, mean: np.ndarray, sigma: float, generator: np.random.Generator) -> None:
        n = len(mean)
        self.mean, self.sigma, self.generator = mean.copy(), sigma, generator
        self.size = 4 + math.floor(3 * math.log(n))  # λ, equation 48
        raw = math.log((self.size + 1) / 2) - np.log(np.arange(1, self.size + 1))
        best, worst = raw[raw > 0], raw[raw <= 0]
        self.mu_eff = best.sum() ** 2 / np.square(best).sum()
        negative = worst.sum() ** 2 / np.square(worst).sum() if worst.any() else 0.0
        mu = self.mu_eff
        self.c_c = (4 + mu / n) / (n + 4 + 2 * mu / n)
        self.c_sigma = (mu + 2) / (n + mu + 5)
        self.c_1 = 2 / ((n + 1.3) ** 2 + mu)
        self.c_mu = min(1 - self.c_1, 2 * (0.25 + mu + 1 / mu - 2) / ((n + 2) ** 2 + mu))
        self.damping = 1 + 2 * max(0, math.sqrt((mu - 1) / (n + 1)) - 1) + self.c_sigma
        # Weights of the worse half are negative, and no more than keeps C positive (50 to 53).
        most = min(
            1 + self.c_1 / self.c_mu,
            1 + 2 * negative / (mu + 2),
            (1 - self.c_1 - self.c_mu) / (n * self.c_mu),
        )
        below = np.abs(worst).sum() or 1.0
        self.weights = np.where(raw > 0, raw / best.sum(), most * raw / below)
        self.path_c, self.path_sigma = np.zeros(n), np.zeros(n)
        self.C = np.eye(n)
        self.generation = 0
        #: E‖N(0, I)‖
        self.length = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))

    def draw(self) -> np.ndarray:
        """One generation of points, ``[λ, n]`` (38 to 40)."""
        values, B = np.linalg.eigh(self.C)
        self._roots, self._B = np.sqrt(np.maximum(values, 1e-20)), B
        z = self.generator.standard_normal((self.size, len(self.mean)))
        self._y = z * self._roots @ B.T
        points: np.ndarray = self.mean + self.sigma * self._y
        return points

    def learn(self, points: np.ndarray, costs: Sequence[float]) -> None:
        """Moves and shapes the distribution by a generation and its costs (41 to 47)."""
        n = len(self.mean)
        y = self._y[np.argsort(costs, kind="stable")]
        w = self.weights
        step = w[w > 0] @ y[w > 0]
        self.mean = self.mean + self.sigma * step
        self.generation += 1
        # C^(-1/2) ⟨y⟩
        whitened = self._B @ ((self._B.T @ step) / self._roots)
        c = self.c_sigma
        self.path_sigma = (1 - c) * self.path_sigma + math.sqrt(
            c * (2 - c) * self.mu_eff
        ) * whitened
        norm = float(np.linalg.norm(self.path_sigma))
        settled = math.sqrt(1 - (1 - c) ** (2 * self.generation))
        steady = norm / settled < (1.4 + 2 / (n + 1)) * self.length  # h_σ
        c = self.c_c
        self.path_c = (1 - c) * self.path_c
        if steady:
            self.path_c = self.path_c + math.sqrt(c * (2 - c) * self.mu_eff) * step
        inverse = (y @ self._B) / self._roots
        scaled = np.where(w >= 0, w, w * n / (np.square(inverse).sum(1) + 1e-20))
        kept = 1 - self.c_1 - self.c_mu * w.sum() + (not steady) * self.c_1 * c * (2 - c)
        self.C = (
            kept * self.C
            + self.c_1 * np.outer(self.path_c, self.path_c)
            + self.c_mu * (y.T * scaled) @ y
        )
        self.C = (self.C + self.C.T) / 2
        self.sigma *= math.exp(min(1.0, self.c_sigma / self.damping * (norm / self.length - 1)))
