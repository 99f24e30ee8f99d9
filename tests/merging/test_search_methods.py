"""Ways to find weights on functions whose minimum is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from cfm_train.merging.search.bayes import expected_improvement
from cfm_train.merging.search.cma_es import Strategy
from cfm_train.merging.search.search import lower, make_search
from tests.merging.benches import problem, searching, walk


def ellipsoid(x: np.ndarray) -> float:
    return float(np.square(x) @ 10.0 ** np.arange(len(x)))


def rosenbrock(x: np.ndarray) -> float:
    return float(100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2)


@pytest.mark.parametrize(
    ("function", "size", "generations", "minimum"),
    [(ellipsoid, 1, 40, 0.0), (ellipsoid, 4, 100, 0.0), (rosenbrock, 2, 120, 1.0)],
)
def test_cma_es_minimises(
    function: Callable[[np.ndarray], float], size: int, generations: int, minimum: float
) -> None:
    strategy = Strategy(np.full(size, -0.5), 0.3, np.random.default_rng(0))
    for _ in range(generations):
        points = strategy.draw()
        strategy.learn(points, [function(point) for point in points])
    assert np.abs(strategy.mean - minimum).max() < 1e-4
    assert np.linalg.eigvalsh(strategy.C).min() > 0


def test_cma_es_takes_the_constants_of_the_tutorial() -> None:
    """Table 1 for n = 4: what Hansen's own formulas give, written out once more."""
    strategy = Strategy(np.zeros(4), 1.0, np.random.default_rng(0))
    assert strategy.size == 8
    raw = np.log(4.5) - np.log(np.arange(1, 9))
    assert strategy.weights[:4] == pytest.approx(raw[:4] / raw[:4].sum())
    assert strategy.mu_eff == pytest.approx(raw[:4].sum() ** 2 / (raw[:4] ** 2).sum())
    assert strategy.weights[4:].sum() < 0 and (strategy.weights[4:] <= 0).all()
    assert strategy.length == pytest.approx(1.8800, abs=1e-3)  # sqrt(2) Γ(5/2) / Γ(2)


@pytest.mark.parametrize("kind", ["bayes", "cma_es"])
def test_bounds_hold_and_the_minimum_is_found_again(kind: str) -> None:
    """A minimum inside, and one beyond the bounds, which ends on the border."""
    trials = 16 if kind == "bayes" else 120
    search = make_search(searching(kind, trials=trials))
    where = problem((0.0, 2.0), (-1.0, 1.0))

    def cost(point: Sequence[float]) -> float:
        return (point[0] - 1.4) ** 2 + (point[1] - 1.5) ** 2

    seen = walk(search.propose(where), cost)
    assert len(seen) == trials == search.count(where)
    assert all(0 <= x <= 2 and -1 <= y <= 1 for (x, y), _ in seen)
    best = seen[lower([one for _, one in seen])][0]
    assert best == pytest.approx((1.4, 1.0), abs=0.1)
    assert walk(search.propose(where), cost) == seen
    short = make_search(searching(kind, trials=4))
    assert walk(short.propose(replace(where, seed=1)), cost) != seen[:4]


def test_expected_improvement_is_an_expectation() -> None:
    drawn = np.random.default_rng(0).standard_normal(400_000)
    for mean, deviation in ((0.3, 0.5), (1.2, 0.4), (0.0, 1e-3)):
        gain = np.maximum(0.6 - (mean + deviation * drawn), 0).mean()
        found = expected_improvement(np.array([mean]), np.array([deviation]), 0.6)[0]
        assert found == pytest.approx(gain, abs=2e-3)


def test_lorahub_starts_at_zero_and_keeps_weights_small() -> None:
    search = make_search(searching("lorahub", trials=60, l1=0.1))
    where = problem((-1.5, 1.5), (-1.5, 1.5))

    def cost(point: Sequence[float]) -> float:
        # The second weight hardly matters: the penalty puts it near zero.
        return (point[0] - 1) ** 2 + 0.001 * (point[1] - 1) ** 2 + search.penalty(point)

    seen = walk(search.propose(where), cost)
    assert seen[0][0] == (0.0, 0.0)
    assert search.penalty([1.0, -0.5]) == pytest.approx(0.1 * 1.5 / 2)  # their code: the mean
    best = seen[lower([one for _, one in seen])][0]
    # (x - 1)² + 0.05 |x| is least at 1 - 0.05 / 2.
    assert best[0] == pytest.approx(0.975, abs=0.1) and abs(best[1]) < 0.15
