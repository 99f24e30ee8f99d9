"""Points of a search against merges that are really made, on rows of two tasks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cfm_train.config.merging import complete
from cfm_train.evaluation.judge import judge_task
from cfm_train.merging import engine
from cfm_train.merging.mix import make_mix
from cfm_train.merging.search.search import lower
from cfm_train.operations.bench import Bench
from tests.merging.benches import LABELS, bench_of


def by_hand(
    bench: Bench, rule: str, weights: Sequence[float] | None, **merge: Any
) -> tuple[float, float]:
    """Mean accuracy and loss on the bench's rows of a merge that is really made."""
    mix = make_mix(complete(rule, merge))
    made = engine.merge(bench.bricks, weights, mix, bench.backbone, sources=LABELS).brick
    accuracy, loss = [], []
    for name, rows in bench.rows.items():
        with bench.backbone.slots.plugged([made]):
            answers = judge_task(bench.backbone, made.head_for(name), bench.specs[name], rows)
        right = [answers.predictions[i] == answers.references[i] for i in answers.predictions]
        accuracy.append(sum(right) / len(right))
        loss.append(answers.loss())
    return sum(accuracy) / 2, sum(loss) / 2


@pytest.mark.parametrize("objective", ["metric", "loss"])
def test_grid_finds_what_a_loop_finds(objective: str, tmp_path: Path) -> None:
    bench = bench_of(
        tmp_path,
        "grid",
        "task_arithmetic",
        objective=objective,
        weights=[0.0, 1.5],
        space={"scale": [0.5, 2.0]},
    )
    seen = [bench.try_out(point) for point in bench.search.propose(bench.problem)]
    points = [(*w, s) for w in itertools.product([0.0, 1.5], repeat=2) for s in (0.5, 2.0)]
    assert [tuple(one.point) for one in seen] == points
    at = 0 if objective == "metric" else 1
    loop = [by_hand(bench, "task_arithmetic", p[:2], scale=p[2])[at] for p in points]
    assert [one.value for one in seen] == pytest.approx(loop, abs=1e-5)
    sign = -1 if objective == "metric" else 1
    best = lower([one.cost for one in seen])
    assert best == min(range(len(loop)), key=lambda i: (round(sign * loop[i], 5), i))
    assert bench.weights(seen[best].point) == list(points[best][:2])
    assert bench.mixed(seen[best].point)["scale"] == points[best][2]


def test_other_rules_are_merged_anew(tmp_path: Path) -> None:
    bench = bench_of(
        tmp_path, "grid", "ties/mergekit", objective="loss",
        weights=[0.0, 1.0], space={"density": [0.3, 0.8]},
    )  # fmt: skip
    seen = [bench.try_out(point) for point in bench.search.propose(bench.problem)]
    assert len(seen) == 6  # nothing is left to be averaged with weights of zero
    for one in seen:
        *weights, density = one.point
        _, loss = by_hand(bench, "ties/mergekit", weights, density=density)
        assert one.value == pytest.approx(loss, abs=1e-6)


def test_parameters_of_a_rule_without_weights(tmp_path: Path) -> None:
    bench = bench_of(
        tmp_path, "grid", "magmax", objective="loss", weights=None, space={"scale": [0.2, 1.0]}
    )
    seen = [bench.try_out(point) for point in bench.search.propose(bench.problem)]
    assert [one.value for one in seen] == pytest.approx(
        [by_hand(bench, "magmax", None, scale=s)[1] for s in (0.2, 1.0)], abs=1e-6
    )
    assert bench.weights(seen[0].point) is None
