"""A figure over seeds: the mean of independent runs with its 95 % interval (Student 1908).

    mean ± t · s / √n        s: the runs' standard deviation (n - 1); t: Student's, n - 1 degrees

It covers what the seed decides (first values, order, dropout) on the test examples that there are;
each run's own interval covers the choice of the examples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

LEVEL = 0.95


def over_seeds(values: Sequence[float]) -> dict[str, float | int]:
    """Mean and interval of one figure of several runs.

    Args:
        values: the figure in each run, at least two.

    Returns:
        ``value``, ``low``, ``high``, and ``n``, the number of runs.
    """
    count, mean = len(values), statistics.fmean(values)
    half = student_quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return {"value": mean, "low": mean - half, "high": mean + half, "n": count}


def student_quantile(degrees: int, level: float = LEVEL) -> float:
    """The t with P(|T| ≤ t) = level, by bisection.

    Args:
        degrees: degrees of freedom, at least 1.
        level: the two-sided level, below 1.
    """
    low, high = 0.0, 1.0
    while _within(high, degrees) < level:
        high *= 2
    for _ in range(80):  # more halvings than a float has bits
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """P(|T| ≤ t), the finite series for whole degrees (Abramowitz & Stegun 1964, 26.7.3-4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2 == 1
    term = cosine if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine**2 * ((k - 1) / k)
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
