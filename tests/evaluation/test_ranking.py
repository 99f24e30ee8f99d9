"""Averages and margins against naive loops over the same resamples; shared rows count once."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cfm_train.evaluation.examples import Examples
from cfm_train.evaluation.ranking import METHOD, OVER_SEEDS, Ranking


def answers(share: float, n: int, seed: int, right: np.ndarray | None = None) -> Examples:
    """A classifier that is right on about this share of n rows."""
    draw = np.random.default_rng(seed)
    classes = draw.integers(2, size=n) if right is None else right
    hits = draw.random(n) < share
    return Examples({"classification": np.stack([classes, np.where(hits, classes, 1 - classes)], 1)
                     .astype(float)}, ("no", "yes"))  # fmt: skip


def accuracy(examples: Examples) -> float:
    rows = examples.parts["classification"]
    return float((rows[:, 0] == rows[:, 1]).mean())


ROWS = {
    "a": {"t": answers(0.9, 200, 1), "u": answers(0.6, 120, 2)},
    "b": {"t": answers(0.6, 200, 3), "u": answers(0.85, 120, 4)},
    "ab": {"t": answers(0.85, 200, 5), "u": answers(0.8, 120, 6)},
}
METRICS = {"t": "accuracy", "u": "accuracy"}


def test_means_and_shares_of_the_individual_bricks() -> None:
    ranking = Ranking(ROWS, METRICS, {"t": "a", "u": "b"}, bootstrap=4000, seed=0)
    for label, row in ROWS.items():
        values = {task: accuracy(row[task]) for task in METRICS}
        mean, normal = ranking.means()[label], ranking.normalised()[label]
        assert mean["value"] == pytest.approx(np.mean(list(values.values())))
        assert mean["n"] == 320
        shares = [values["t"] / accuracy(ROWS["a"]["t"]), values["u"] / accuracy(ROWS["b"]["u"])]
        assert normal["value"] == pytest.approx(np.mean(shares))
        variance = sum(v * (1 - v) / n for v, n in zip(values.values(), (200, 120), strict=True))
        half = 1.96 * np.sqrt(variance) / 2
        assert mean["high"] - mean["low"] == pytest.approx(2 * half, rel=0.1)
    assert Ranking(ROWS, METRICS, {"t": "a"}, bootstrap=10, seed=0).normalised() == {}


def test_the_margin_is_paired_and_by_task() -> None:
    """Bootstrap of the difference on the same rows, by a loop."""
    ranking = Ranking(ROWS, METRICS, {}, bootstrap=4000, seed=0)
    winner = ranking.winner({label: [label] for label in ROWS})
    assert winner is not None
    assert (winner["label"], winner["by"], winner["method"]) == ("ab", "mean", METHOD)
    second = winner["runner_up"]
    hits = {label: [row[t].parts["classification"] for t in METRICS] for label, row in ROWS.items()}
    apart = [
        (x[:, 0] == x[:, 1]).astype(float) - (y[:, 0] == y[:, 1])
        for x, y in zip(hits["ab"], hits[second], strict=True)
    ]
    draw = np.random.default_rng(7)
    means = [np.mean([d[draw.integers(len(d), size=len(d))].mean() for d in apart])
             for _ in range(4000)]  # fmt: skip
    low, high = np.quantile(means, [0.025, 0.975])
    assert winner["margin"]["value"] == pytest.approx(np.mean([d.mean() for d in apart]))
    found = winner["margin"]["low"], winner["margin"]["high"]
    assert found == pytest.approx((low, high), abs=0.012)
    assert winner["clear"] == (winner["margin"]["low"] > 0)
    for (task, margin), difference in zip(winner["tasks"].items(), apart, strict=True):
        assert margin["value"] == pytest.approx(difference.mean()), task


def test_tasks_that_share_their_test_rows_count_once() -> None:
    """The same column twice changes no average, no interval, no margin, no number of examples."""
    twice = {label: {**row, "v": row["t"]} for label, row in ROWS.items()}
    metrics = {"t": "accuracy", "v": "accuracy", "u": "accuracy"}
    sets = {"t": "one", "v": "one", "u": "two"}
    once = Ranking(ROWS, METRICS, {"t": "a", "u": "b"}, {"t": "one", "u": "two"},
                   bootstrap=500, seed=3)  # fmt: skip
    both = Ranking(twice, metrics, {"t": "a", "v": "a", "u": "b"}, sets, bootstrap=500, seed=3)
    assert both.examples == once.examples == 320
    rivals = {label: [label] for label in ROWS}
    for label in ROWS:
        for key in ("value", "low", "high", "n"):
            assert both.means()[label][key] == pytest.approx(once.means()[label][key])
            assert both.normalised()[label][key] == pytest.approx(once.normalised()[label][key])
    a, b = once.winner(rivals), both.winner(rivals)
    assert a and b and a["margin"] == pytest.approx(b["margin"])
    apart = Ranking(twice, metrics, {}, bootstrap=500, seed=3)
    assert apart.examples == 520 and apart.means()["a"]["value"] > both.means()["a"]["value"]


def test_seeds_rank_as_their_mean_and_are_paired() -> None:
    right = np.random.default_rng(0).integers(2, size=300)
    rows = {
        f"{name}{seed}": {"t": answers(share, 300, 10 * seed + at, right)}
        for at, (name, share) in enumerate((("x", 0.8), ("y", 0.7)))
        for seed in (1, 2, 3)
    }
    ranking = Ranking(rows, {"t": "accuracy"}, {}, bootstrap=100, seed=0)
    winner = ranking.winner({name: [f"{name}{s}" for s in (1, 2, 3)] for name in "xy"})
    assert winner is not None and winner["label"] == "x" and winner["method"] == OVER_SEEDS
    apart = [accuracy(rows[f"x{s}"]["t"]) - accuracy(rows[f"y{s}"]["t"]) for s in (1, 2, 3)]
    expected = stats.ttest_1samp(apart, 0.0).confidence_interval(0.95)
    margin = winner["margin"]
    assert (margin["low"], margin["high"]) == pytest.approx((expected.low, expected.high))
    assert margin["n"] == 3 and winner["figure"]["n"] == 3


def test_losses_rank_from_below_and_mixed_tasks_by_shares() -> None:
    nats = {
        label: Examples({"causal": np.stack([np.full(50, loss), np.ones(50)], 1)}, None)
        for label, loss in (("a", 2.0), ("b", 1.5))
    }
    losses = {label: {"l": each} for label, each in nats.items()}
    ranking = Ranking(losses, {"l": "loss"}, {}, bootstrap=20, seed=0)
    winner = ranking.winner({"a": ["a"], "b": ["b"]})
    assert winner and winner["label"] == "b" and winner["lower_is_better"]
    assert winner["margin"]["value"] == pytest.approx(0.5)
    mixed = {label: {"l": nats[label], "t": ROWS[label]["t"]} for label in "ab"}
    ranking = Ranking(mixed, {"l": "loss", "t": "accuracy"}, {"l": "b", "t": "a"}, bootstrap=50,
                      seed=0)  # fmt: skip
    winner = ranking.winner({"a": ["a"], "b": ["b"]})
    assert ranking.means() == {} and winner and winner["by"] == "normalised"
    shares = accuracy(ROWS["b"]["t"]) / accuracy(ROWS["a"]["t"])
    assert ranking.normalised()["b"]["value"] == pytest.approx((1 + shares) / 2)
    assert ranking.normalised()["a"]["value"] == pytest.approx((1 + 1.5 / 2) / 2)
