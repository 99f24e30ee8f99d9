"""What the peer benchmark makes of its runs, against SciPy."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
from scipy import stats

from benchmarks.task_bricks import summary, tasks_of

#: Scores of ours and of the peer, by task and seed.
SCORES = {
    "a": [(0.90, 0.88), (0.91, 0.90), (0.89, 0.90)],
    "b": [(0.70, 0.75), (0.71, 0.74), (0.69, 0.74)],
    "c": [(0.60, 0.60), (0.64, 0.61)],
}


def rows() -> list[dict[str, object]]:
    made: list[dict[str, object]] = []
    for task, seeds in SCORES.items():
        for seed, pair in enumerate(seeds):
            for arm, score, speed in zip(("ours", "peer_bf16"), pair, (200.0, 100.0), strict=True):
                speed *= 1 + seed if arm == "ours" else 1
                one = {"task": task, "seed": seed, "arm": arm, "score": score}
                made.append({**one, "samples_per_second": speed})
    return made


def test_score_difference_is_an_interval_over_tasks() -> None:
    means = [100 * statistics.fmean(a - b for a, b in seeds) for seeds in SCORES.values()]
    expected = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    found = summary(rows())["score_difference"]
    assert found["mean"] == pytest.approx(statistics.fmean(means))
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert (found["tasks"], found["runs"]) == (3, 8)


def test_one_task_has_no_interval() -> None:
    assert "score_difference" not in summary([row for row in rows() if row["task"] == "a"])


def test_speed_is_the_geometric_mean_of_ratios() -> None:
    found = summary(rows())["speed_over_peer_bf16"]
    assert found["geometric_mean"] == pytest.approx(math.prod([2, 4, 6, 2, 4, 6, 2, 4]) ** (1 / 8))
    assert (found["lowest"], found["highest"], found["runs"]) == (2, 6, 8)


def test_tasks_come_from_the_folder(tmp_path: Path) -> None:
    (tmp_path / "tasks.json").write_text(json.dumps({"b": {}, "a": {}}))
    assert tasks_of(tmp_path) == ["b", "a"]
