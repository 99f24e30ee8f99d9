"""95 % percentile bootstrap intervals over examples (Efron, 1979), vectorised and seeded.

Every metric of ours is a function of weighted examples, and a bootstrap resample is nothing but
integer weights: ``w ~ Multinomial(n, 1/n)``. Examples that contribute the same can be drawn as one:
``Multinomial(n, count/n)`` over the distinct ones is exactly the same distribution, and a confusion
matrix has few distinct examples. So 1,000 resamples of a test set cost milliseconds.

What the percentile interval cannot do: where all examples agree (one example, or every answer
right) no resample differs, so the interval has no width. Read ``n`` beside it: with every one of n
answers right, an error rate up to 3/n is still plausible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

#: Two-sided level of all intervals.
LEVEL = 0.95

#: How many weights are held at once (8 bytes each); bounds the memory that a large test set takes.
_BLOCK = 2_000_000

Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Score:
    """A figure with its interval.

    Attributes:
        value: the metric on all examples.
        low: lower end of the 95 % interval; never above ``value``.
        high: upper end; never below ``value``.
        n: number of examples (rows, not tokens).
    """

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        """The figure as the record stores it."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def intervals(
    statistics: Mapping[str, Statistic], counts: np.ndarray, *, bootstrap: int, seed: int
) -> dict[str, Score]:
    """Statistics of weighted examples with their intervals, all from the same resamples.

    Args:
        statistics: each maps weights, float64 [resamples, distinct], to values [resamples]
            without NaN.
        counts: how often each distinct example occurs, int64 [distinct]; they sum to n > 0.
        bootstrap: number of resamples; 0 gives intervals without width.
        seed: seed of the draws; the same seed and counts give the same intervals.

    Returns:
        The scores by name. An interval is widened to hold its value where the resamples lie on one
        side of it, as those of a biased statistic on a handful of examples do.
    """
    values = {name: float(f(counts[None].astype(np.float64))[0]) for name, f in statistics.items()}
    draws: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
    for weights in resample_weights(counts, bootstrap, seed):
        for name, statistic in statistics.items():
            draws[name].append(statistic(weights))
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    scores = {}
    for name, value in values.items():
        low, high = (
            float(end)
            for end in np.quantile(np.concatenate(draws[name] or [np.array([value])]), tails)
        )
        scores[name] = Score(value, min(low, value), max(high, value), int(counts.sum()))
    return scores


def resample_weights(
    counts: np.ndarray, bootstrap: int, seed: int | Sequence[int]
) -> Iterator[np.ndarray]:
    """Draws the weights of bootstrap resamples, a block at a time.

    Args:
        counts: how often each distinct example occurs, int64 [distinct].
        bootstrap: number of resamples.
        seed: seed of the draws.

    Yields:
        Weights, whole numbers in float64 (ready for a matrix product) [resamples of the block,
        distinct]; every row sums to n.
    """
    generator = np.random.default_rng(seed)
    n, distinct = int(counts.sum()), len(counts)
    block = max(1, _BLOCK // n)
    for start in range(0, bootstrap, block):
        rows = min(block, bootstrap - start)
        if distinct * 4 < n:
            weights = generator.multinomial(n, counts / n, size=rows)
        else:  # where nearly all examples differ, n draws are cheaper than a binomial for each
            example = np.repeat(np.arange(distinct), counts)
            drawn = (
                example[generator.integers(n, size=(rows, n))] + distinct * np.arange(rows)[:, None]
            )
            weights = np.bincount(drawn.ravel(), minlength=rows * distinct).reshape(rows, distinct)
        yield weights.astype(np.float64)


def paired_interval(
    score_a_per_row: np.ndarray,
    score_b_per_row: np.ndarray,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Score:
    """Interval of the mean difference ``a - b`` of two systems on the same rows.

    Pairing takes out what makes a row hard for both, so it finds differences that two separate
    intervals hide. The difference is real at 95 % when the interval leaves out zero.

    Args:
        score_a_per_row: one score per row of the first system, float [n].
        score_b_per_row: the same rows' scores of the second, float [n].
        bootstrap: number of resamples.
        seed: seed of the draws.

    Returns:
        The mean difference with its interval.

    Raises:
        ValueError: the arrays differ in length, are empty, or hold a NaN or an infinity.
    """
    a, b = (np.asarray(x, dtype=np.float64).ravel() for x in (score_a_per_row, score_b_per_row))
    if a.shape != b.shape or not a.size:
        raise ValueError(
            f"paired scores need the same rows on both sides, got {a.size} and {b.size}"
        )
    difference = a - b
    if not np.isfinite(difference).all():
        raise ValueError("paired scores hold a NaN or an infinity")
    distinct, counts = np.unique(difference, return_counts=True)
    mean = {"difference": lambda weights: weights @ distinct / a.size}
    return intervals(mean, counts, bootstrap=bootstrap, seed=seed)["difference"]
