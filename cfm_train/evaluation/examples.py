"""The examples of one evaluation: what is kept of it, and what every figure can be made from.

    scores      the metrics, each with its own bootstrap interval
    together    a metric of several systems on the same examples, resampled together

Where several systems answer the same rows, each resample draws the same rows for all of them
(Efron & Tibshirani 1993, chapter 16): what makes a row hard for everyone then falls out of every
difference and ratio between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cfm_train.data.tasks import LOWER_IS_BETTER, METRICS
from cfm_train.errors import UserError
from cfm_train.evaluation.intervals import LEVEL, Score, resample_weights
from cfm_train.evaluation.metrics import score_rows, statistics


@dataclass(frozen=True)
class Examples:
    """What each row of a split adds to its task's metrics.

    Attributes:
        parts: task type of the metrics -> float64 [rows, …], see `contributions`; one part, of
            written answers two (their texts, and how likely the right ones are).
        labels: the task's label names, None where it has none.
    """

    parts: Mapping[str, np.ndarray]
    labels: tuple[str, ...] | None

    def scores(self, *, bootstrap: int, seed: int) -> dict[str, Score]:
        """All metrics with their intervals."""
        scores: dict[str, Score] = {}
        for kind, rows in self.parts.items():
            scores |= score_rows(kind, rows, labels=self.labels, bootstrap=bootstrap, seed=seed)
        return scores

    def rows_of(self, metric: str) -> tuple[str, np.ndarray]:
        """The part that a metric is computed from, by its task type."""
        return next((kind, rows) for kind, rows in self.parts.items() if metric in METRICS[kind])


@dataclass(frozen=True)
class Together:
    """A metric of several systems on the same examples.

    Attributes:
        values: on all examples, float64 [systems].
        draws: on each resample, float64 [systems, resamples].
        n: number of examples.
    """

    values: np.ndarray
    draws: np.ndarray
    n: int


def together(
    systems: Sequence[Examples],
    metric: str | Sequence[str],
    *,
    bootstrap: int,
    seed: int | Sequence[int],
) -> Together:
    """A metric of several systems on the same examples, resampled together.

    Args:
        systems: the examples of each, of the same rows in the same order.
        metric: one that they all have, or one for each.
        bootstrap: number of resamples, at least 1.
        seed: seed of the draws.

    Raises:
        UserError: the systems answered different numbers of rows.
    """
    metrics = [metric] * len(systems) if isinstance(metric, str) else list(metric)
    found = [system.rows_of(one) for system, one in zip(systems, metrics, strict=True)]
    first = found[0][1]
    widths = [rows.shape[1] for _, rows in found]
    if any(len(rows) != len(first) for _, rows in found):
        lengths = ", ".join(str(len(rows)) for _, rows in found)
        raise UserError(
            f"The systems to compare answered different rows ({lengths}): evaluate them again with "
            "reuse=false."
        )
    joint, counts = np.unique(
        np.concatenate([rows for _, rows in found], axis=1), axis=0, return_counts=True
    )
    ends = np.cumsum([0, *widths])
    measure = [
        statistics(kind, joint[:, start:end], system.labels)[one]
        for (start, end), (kind, _), system, one in zip(
            itertools.pairwise(ends), found, systems, metrics, strict=True
        )
    ]
    whole = counts[None].astype(np.float64)
    values = np.array([float(one(whole)[0]) for one in measure])
    blocks = [
        np.stack([one(weights) for one in measure])
        for weights in resample_weights(counts, bootstrap, seed)
    ]
    return Together(values, np.concatenate(blocks, axis=1), len(first))


def interval(value: float, draws: np.ndarray, n: int) -> Score:
    """A figure with the percentile interval of its draws, widened to hold the figure.

    Args:
        value: the figure on all examples.
        draws: the figure on each resample, float64 [resamples].
        n: number of examples.
    """
    low, high = (float(end) for end in np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return Score(value, min(low, value), max(high, value), n)


def advantage(a: Examples, b: Examples, metric: str, *, bootstrap: int, seed: int) -> Score:
    """By how much ``a`` is better than ``b`` on the same examples, with its paired interval.

    Args:
        a: one system.
        b: the other, on the same rows.
        metric: one that both have.
        bootstrap: number of resamples.
        seed: seed of the draws.

    Returns:
        ``a - b``, or ``b - a`` for a metric that is better when it is lower: above zero where
        ``a`` is better.
    """
    found = together([a, b], metric, bootstrap=bootstrap, seed=seed)
    sign = -1 if metric in LOWER_IS_BETTER else 1
    difference = sign * (found.draws[0] - found.draws[1])
    return interval(float(sign * (found.values[0] - found.values[1])), difference, found.n)
