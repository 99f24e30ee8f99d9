"""Bayesian optimisation: a Gaussian process of the cost, asked where to look next.

Points that fill the space first (Sobol), then always the point of largest expected improvement over
the best one so far (Jones et al. 1998):

    EI(x) = (f* - μ(x)) Φ(z) + σ(x) φ(z)        z = (f* - μ(x)) / σ(x)

The process is scikit-learn's, with a Matérn kernel of ν = 5/2, a length for every axis and white
noise.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import numpy as np

from cfm_train.config.types import Positive
from cfm_train.merging.search.search import Problem, Proposals, Search

#: Random points among which the next one is sought.
_CANDIDATES = 2048


class Bayes(Search):
    """Gaussian process and expected improvement.

    Args:
        objective: what is compared.
        weights: lowest and highest weight of a brick; None leaves the weights alone.
        space: bounds of other numbers of the merge.
        trials: points in all.
        initial: how many of them are drawn before the process has a say.
    """

    module = "sklearn"
    package = "scikit-learn"

    def __init__(
        self,
        objective: Literal["metric", "loss"],
        weights: list[float] | None,
        space: dict[str, list[float]],
        trials: Positive,
        initial: Positive,
    ) -> None:
        self.objective = objective
        self.weights, self.space = weights, space
        self.trials, self.initial = trials, initial

    def count(self, problem: Problem) -> int:
        """See the contract."""
        return self.trials

    def propose(self, problem: Problem) -> Proposals:
        """See the class; all axes are brought to the range from 0 to 1."""
        from scipy.stats.qmc import Sobol

        low = np.array([axis.values[0] for axis in problem.axes])
        size = np.array([axis.values[-1] for axis in problem.axes]) - low
        n = len(low)
        power = math.ceil(math.log2(max(2, self.initial)))
        first = Sobol(n, seed=problem.seed).random_base2(power)[: self.initial]
        generator = np.random.default_rng(problem.seed)
        points = np.empty((0, n))
        costs: list[float] = []
        for number in range(self.trials):
            point = first[number] if number < len(first) else None
            if point is None:
                point = _next(points, np.array(costs), generator, problem.seed)
            cost = yield (low + size * point).tolist()
            if math.isfinite(cost):
                points = np.vstack([points, point])
                costs.append(cost)


def _next(
    points: np.ndarray, costs: np.ndarray, generator: np.random.Generator, seed: int
) -> np.ndarray:
    """The point of largest expected improvement, ``[n]``, among random ones and the best's kin."""
    n = points.shape[1]
    process = fitted(points, costs, seed)
    best = points[costs.argmin()]
    near = best + 0.05 * generator.standard_normal((_CANDIDATES // 4, n))
    candidates = np.vstack([generator.random((_CANDIDATES, n)), np.clip(near, 0, 1)])
    mean, deviation = process.predict(candidates, return_std=True)
    gain = expected_improvement(mean, deviation, float(costs.min()))
    chosen: np.ndarray = candidates[gain.argmax()]
    return chosen


def fitted(points: np.ndarray, costs: np.ndarray, seed: int) -> Any:
    """A Gaussian process through costs at points ``[m, n]`` from 0 to 1."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(
        [0.3] * points.shape[1], (0.05, 10.0), nu=2.5
    ) + WhiteKernel(1e-3, (1e-8, 1.0))
    process = GaussianProcessRegressor(
        kernel, normalize_y=bool(np.ptp(costs) > 0), n_restarts_optimizer=2, random_state=seed
    )
    with warnings.catch_warnings():  # a length at its bound is an axis that does not matter
        warnings.simplefilter("ignore", ConvergenceWarning)
        return process.fit(points, costs)


def expected_improvement(mean: np.ndarray, deviation: np.ndarray, best: float) -> np.ndarray:
    """By how much less than ``best`` a normal variable is expected to be; 0 where it is more."""
    from scipy.stats import norm

    deviation = np.maximum(deviation, 1e-12)
    z = (best - mean) / deviation
    gain: np.ndarray = (best - mean) * norm.cdf(z) + deviation * norm.pdf(z)
    return gain
