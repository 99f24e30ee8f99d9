"""Sets of records that a page must stand: many rows, lower-is-better figures, seeds, nothing."""

from __future__ import annotations

from pathlib import Path

from demo_records import TASKS, cell, compared, figure, found, quickstart, trained

from cfm_train.tracking.record import Record, new_record


def many(tmp_path: Path) -> list[Record]:
    """Twelve long-named tasks with three seeds each, and a run that failed."""
    records = []
    for seed in (1, 2, 3):
        for number in range(12):
            task, value = f"a_long_task_name_{number}", 0.6 + 0.03 * number + 0.004 * seed
            records.append(
                new_record(
                    operation="train", recipe=f"task/{task}", name=task, seed=seed,
                    config_hash=f"{seed}{number}", metrics={"test/accuracy": figure(value)},
                    brick={"name": task, "version": f"{seed}{number:02}aa", "path": str(tmp_path),
                           "parents": []},
                    backbone={"id": "minilm", "fingerprint": "ab" * 32, "unchanged": True},
                    matrix=[cell(task, task, value, "brick"),
                            cell("frozen backbone", task, value - 0.08, "floor")],
                    cost={"seconds": 40.0, "train_seconds": 30.0 + number,
                          "trainable_parameters": 99_000 + number},
                )
            )  # fmt: skip
    failed = {"status": "failed", "error": "the loss became NaN at step 41"}
    return [
        *records,
        new_record(operation="train", recipe="task/x", name="x", seed=1, config_hash="x", **failed),
    ]


def language(tmp_path: Path) -> list[Record]:
    """Two language models: their figures are better when they are lower."""
    records = []
    for name, loss, floor in (("poems", 2.1, 3.4), ("laws", 2.6, 3.5)):
        record = trained(tmp_path, "topic", name=name)
        shared = {"n": 250, "metric": "loss", "task": "stories"}
        own = {"value": loss, "low": loss - 0.1, "high": loss + 0.1}
        bound = {"value": floor, "low": floor - 0.1, "high": floor + 0.1}
        record["matrix"] = [
            {"brick": name, "role": "brick", **own, **shared},
            {"brick": "frozen backbone", "role": "floor", **bound, **shared},
        ]  # type: ignore[list-item]
        record["metrics"] = {"test/loss": {**own, "n": 250}}  # type: ignore[typeddict-item]
        records.append(record)
    return records


def seeds(tmp_path: Path) -> list[Record]:
    """Two bricks with three seeds each."""
    return [
        trained(tmp_path, task, seed=seed, seedless_hash=task * 4)
        for task in list(TASKS)[:2]
        for seed in (1, 2, 3)
    ]


SETS = {
    "compared": compared,
    "seeds": seeds,
    "quickstart": quickstart,
    "one run": lambda out: [trained(out, "topic")],
    "many": many,
    "language": language,
    "found weights": lambda out: [found(out), found(out, "adapted", adapts=True)],
    "none": lambda out: [],
}
