"""Paired differences of any metric against naive resampling of the very same rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cfm_train.data.tasks import LOWER_IS_BETTER, TaskSpec
from cfm_train.evaluation.evaluator import Answers
from cfm_train.evaluation.metrics import score
from cfm_train.evaluation.paired import advantage

N = 60


def answers(task: str, predictions: Any, references: Any, labels: Any = None) -> Answers:
    spec = TaskSpec.__new__(TaskSpec)
    for key, value in {"name": "t", "type": task, "labels": labels, "metric": ""}.items():
        object.__setattr__(spec, key, value)
    return Answers(spec, dict(enumerate(predictions)), dict(enumerate(references)))


def two_systems(task: str) -> tuple[Any, Any, Any, Any]:
    draw = np.random.default_rng(7)
    if task == "classification":
        right = draw.integers(0, 3, N)
        return *(np.where(draw.random(N) < p, right, draw.integers(0, 3, N)) for p in (0.7, 0.4)), \
            right, None  # fmt: skip
    if task == "regression":
        right = np.round(draw.normal(size=N), 1)
        return *(np.round(right + s * draw.normal(size=N), 1) for s in (0.4, 0.8)), right, None
    if task == "token":
        labels = ("O", "B-X", "I-X")
        right = [draw.integers(0, 3, 5) for _ in range(N)]
        noisy = [
            [np.where(draw.random(5) < p, r, draw.integers(0, 3, 5)) for r in right]
            for p in (0.8, 0.5)
        ]
        return *noisy, right, labels
    counts = draw.integers(1, 9, N)
    return counts * draw.random(N), counts * draw.random(N), counts, None


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        ("classification", "accuracy"),
        ("classification", "macro_f1"),
        ("classification", "mcc"),
        ("regression", "pearson"),
        ("regression", "rmse"),
        ("token", "entity_f1"),
        ("causal", "perplexity"),
    ],
)
def test_equals_resampling_row_by_row(task: str, metric: str) -> None:
    one, two, right, labels = two_systems(task)
    found = advantage(
        answers(task, one, right, labels), answers(task, two, right, labels), metric,
        bootstrap=4000, seed=3,
    )  # fmt: skip
    sign = -1 if metric in LOWER_IS_BETTER else 1

    def difference(rows: np.ndarray) -> float:
        a, b = (
            score(task, [x[i] for i in rows], [right[i] for i in rows], labels=labels, bootstrap=0)
            for x in (one, two)
        )
        return sign * (a[metric].value - b[metric].value)

    assert found.value == pytest.approx(difference(np.arange(N)), abs=1e-12)
    draw = np.random.default_rng(11)
    naive = [difference(draw.integers(0, N, N)) for _ in range(1500)]
    low, high = np.quantile(naive, [0.025, 0.975])
    width = high - low
    assert abs(found.low - low) < 0.12 * width and abs(found.high - high) < 0.12 * width
    assert found.n == N


def test_nothing_differs_from_itself() -> None:
    one, _, right, _ = two_systems("classification")
    same = advantage(
        answers("classification", one, right), answers("classification", one, right), "accuracy",
        bootstrap=100, seed=0,
    )  # fmt: skip
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_other_rows_are_refused() -> None:
    one, _, right, _ = two_systems("classification")
    shorter = answers("classification", one[:-1], right[:-1])
    with pytest.raises(ValueError, match="same rows"):
        advantage(answers("classification", one, right), shorter, "accuracy", bootstrap=1, seed=0)
    with pytest.raises(ValueError, match="no metric 'rmse'"):
        advantage(shorter, shorter, "rmse", bootstrap=1, seed=0)
