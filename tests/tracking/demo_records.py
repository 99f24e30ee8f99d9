"""Records as real runs leave them, on disk with their metrics files, for tests of what is drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from cfm_train.tracking.metrics_file import MetricsFile
from cfm_train.tracking.record import Record, new_record, read_record, write_record

#: task -> (its own brick, frozen backbone with a head)
TASKS = {"sentiment": (0.91, 0.79), "topic": (0.88, 0.74), "intent": (0.94, 0.83)}
FINGERPRINT = "53aa51172d142c89d9012cce15ae4d6c" * 2


def figure(value: float, n: int = 250) -> dict[str, Any]:
    """A figure with a plausible interval."""
    half = 1.96 * math.sqrt(max(value * (1 - value), 1e-3) / n)
    return {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half), "n": n}


def cell(
    brick: str, task: str, value: float, role: str, metric: str = "accuracy"
) -> dict[str, Any]:
    """A cell of the matrix."""
    return {"brick": brick, "task": task, "metric": metric, "role": role, **figure(value)}


def trained(
    out: Path, task: str, *, name: str | None = None, seed: int = 0, **other: Any
) -> Record:
    """The record of a training run on one task, with 60 steps of curves."""
    name = name or task
    value, floor = TASKS[task]
    value += 0.01 * seed
    folder = out / "runs" / f"{name}-{seed}"
    folder.mkdir(parents=True)
    file = MetricsFile(folder / "metrics.jsonl")
    for step in range(1, 61):
        wave = 0.05 * math.sin(step * (1.7 + value))
        file.append(step, {"train/loss": 0.2 + 1.1 * math.exp(-step / 14) + wave})
        file.append(step, {"train/learning_rate": 1e-3 * min(1, step / 6) * (1 - step / 66)})
        if step % 10 == 0:
            file.append(step, {"validation/accuracy": value - 0.3 * math.exp(-step / 15)})
    version = f"{seed}{abs(hash_of(name)):011x}"[:12]
    artifact = out / "library" / name / version
    artifact.mkdir(parents=True)
    (artifact / "brick.json").write_text("{}")
    known: dict[str, Any] = {
        "recipe": f"task/{task}",
        "config_hash": f"{version}ff",
        "brick": {"name": name, "version": version, "path": str(artifact), "parents": []},
        "backbone": {"id": "minilm", "fingerprint": FINGERPRINT, "unchanged": True},
        "metrics": {"test/accuracy": figure(value), "floor/accuracy": figure(floor)},
        "checks": {"backbone unchanged": {"value": True, "tolerance": None, "passed": True}},
        "cost": {
            "seconds": 14.25,
            "train_seconds": 9.5 + seed,
            "samples_per_second": 412.0,
            "tokens_per_second": 9000.0,
            "peak_memory_bytes": 610_000_000,
            "trainable_parameters": 99_456 + 20_000 * list(TASKS).index(task),
            "flop_share": 0.31,
        },
        "matrix": [
            {**cell(name, task, value, "brick"), "head": name},
            cell("frozen backbone", task, floor, "floor"),
        ],
        "samples": [
            {
                "input": f"A sentence about {task}, long enough to be read.",
                "prediction": "yes",
                "reference": "yes" if number else "no",
                "right": bool(number),
                "task": task,
                "at": f"{task}.jsonl:{number + 1}",
                "step": 60,
            }
            for number in range(4)
        ],
        "curves": "metrics.jsonl",
    }
    return _stored(folder, operation="train", name=name, seed=seed, **{**known, **other})


def averaged(out: Path, parents: list[Record]) -> Record:
    """The record of an average of trained bricks, evaluated on all tasks."""
    names = [parent["brick"]["name"] for parent in parents if parent["brick"]]
    name = f"average({', '.join(names)})"
    artifact = out / "library" / "average" / "9c0de1ab34f5"
    artifact.mkdir(parents=True)
    (artifact / "brick.json").write_text("{}")
    folder = out / "runs" / "average"
    folder.mkdir(parents=True)
    values = dict(zip(TASKS, (0.885, 0.861, 0.835), strict=True))
    links = [
        {"name": p["brick"]["name"], "version": p["brick"]["version"], "weight": 0.5}
        for p in parents
        if p["brick"]
    ]
    return _stored(
        folder,
        operation="merge",
        recipe="merge/linear",
        name="average",
        seed=0,
        config_hash="77aa00",
        brick={"name": name, "version": "9c0de1ab34f5", "path": str(artifact), "parents": links},
        backbone={"id": "minilm", "fingerprint": FINGERPRINT, "unchanged": True},
        checks={"weight 1 is the brick": {"value": 0.0, "tolerance": 1e-6, "passed": True}},
        cost={"seconds": 2.5, "trainable_parameters": 247_456, "peak_memory_bytes": 580_000_000},
        matrix=[
            *(cell(name, task, value, "merged") for task, value in values.items()),
            *(cell("multitask", task, TASKS[task][0] - 0.01, "ceiling") for task in TASKS),
        ],
    )


def quickstart(out: Path) -> list[Record]:
    """A brick for each task, each evaluated on all of them, and the average of two."""
    records = []
    for name in TASKS:
        others = [
            {**cell(name, task, TASKS[task][1] - 0.03, "brick"), "head": task}
            for task in TASKS
            if task != name
        ]
        record = trained(out, name)
        record["matrix"] += others  # type: ignore[arg-type]
        write_record(record, Path(record["folder"]) / "record.json")
        records.append(record)
    return [*records, averaged(out, records[:2])]


def hash_of(text: str) -> int:
    """A number from a text that is the same in every process."""
    return sum(ord(character) * 31**at for at, character in enumerate(text)) % 16**11


def _stored(folder: Path, **known: Any) -> Record:
    write_record(new_record(**known), folder / "record.json")
    return read_record(folder)


def compared(out: Path) -> list[Record]:
    """A comparison of three bricks, a merge at three λ, a nested stitch and an unrelated task."""
    trained_bricks = [trained(out, task) for task in TASKS]
    sweep = [f"merge(ties, [sentiment, topic, intent], scale={x:g})" for x in (0.5, 1.0, 1.5)]
    nested = "stitch([sentiment, merge(linear, [topic, intent], weights=[0.3, 0.7])])"
    labels = [*TASKS, *sweep, nested]
    values = {
        **{own: {t: v if t == own else f - 0.03 for t, (v, f) in TASKS.items()} for own in TASKS},
        **{name: {t: f + (v - f) * share for t, (v, f) in TASKS.items()}
           for name, share in zip([*sweep, nested], (0.55, 0.9, 0.7, 0.82), strict=True)},
    }  # fmt: skip
    roles = {label: "brick" if label in TASKS else "merged" for label in labels}
    matrix = [
        {**cell(label, task, value, roles[label]), "head": task if label in TASKS else label}
        for label in labels
        for task, value in [*values[label].items(), ("weather", 0.6)]
    ]
    for one in matrix:
        if one["task"] == "weather":
            one["head"] = "head refitted"
    floors = [*((t, f) for t, (_, f) in TASKS.items()), ("weather", 0.62)]
    matrix += [cell("frozen backbone", t, f, "floor") for t, f in floors]
    parts = {
        r["name"]: {
            "name": r["name"], "version": r["brick"]["version"], "operation": "train",
            "path": r["brick"]["path"], "data": {f"{r['name']}/train": "0a1b2c3d4e5f"},
        }
        for r in trained_bricks
        if r["brick"]
    }  # fmt: skip
    normal = {
        label: sum(values[label][t] / TASKS[t][0] for t in TASKS) / len(TASKS) for label in labels
    } | {"frozen backbone": sum(f / v for v, f in TASKS.values()) / len(TASKS)}
    plain = {label: sum(found.values()) / len(TASKS) for label, found in values.items()}
    plain["frozen backbone"] = sum(f for _, f in TASKS.values()) / len(TASKS)

    def spread(value: float, by: float = 0.02) -> dict[str, Any]:
        return {"value": value, "low": value - by, "high": value + by, "n": 750}

    rows = [
        {
            "label": label, "short": label, "expression": label,
            "role": roles.get(label, "floor"), "brick": parts.get(label),
            "parts": [part for name, part in parts.items() if name in label],
            "competes": label in labels and label not in (sweep[0], sweep[2]),
            "chosen_on": "validation" if label == sweep[1] else None,
            "parameters": None if label == "frozen backbone" else 90_000 + 1000 * at,
            "bytes": None if label == "frozen backbone" else 360_000 + 4000 * at,
            "seconds": None if label == "frozen backbone" else 9.5 if label in TASKS else 0.25,
            "seconds_of": None if label == "frozen backbone" else
            "training" if label in TASKS else "assembly",
            "mean": spread(plain[label]), "normalised": spread(normal[label]),
        }
        for at, label in enumerate([*labels, "frozen backbone"])
    ]  # fmt: skip
    apart = {t: values[sweep[1]][t] - values[nested][t] for t in TASKS}
    similar = [*TASKS, sweep[1]]
    pairs = [
        {"a": a, "b": b, "of": "updates", "reason": None, "cosine": 0.7 - 0.25 * (i + j),
         "sign_conflict": 0.2 + 0.1 * (i + j), "weighted_conflict": 0.1 + 0.1 * (i + j)}
        for i, a in enumerate(similar) for j, b in enumerate(similar) if i < j
    ]  # fmt: skip
    refs = {name: f"{name}@{part['version']}" for name, part in parts.items()}
    nodes = [{**part, "id": refs[name], "kind": "brick"} for name, part in parts.items()]
    made = {"path": None, "kind": "configuration", "data": {}}
    nodes += [
        {**made, "id": "aa11", "name": sweep[1], "version": "aa11", "operation": "merge"},
        {**made, "id": "bb22", "name": "merge(linear, [topic, intent], weights=[0.3, 0.7])",
         "version": "bb22", "operation": "merge"},
        {**made, "id": "cc33", "name": nested, "version": "cc33", "operation": "stitch"},
    ]  # fmt: skip
    edges = [*((refs[t], "aa11", 1.0) for t in TASKS), (refs["topic"], "bb22", 0.3),
             (refs["intent"], "bb22", 0.7), ("bb22", "cc33", None),
             (refs["sentiment"], "cc33", None)]  # fmt: skip
    forgot = [
        {"row": label, "task": task, "metric": "accuracy", "bare": figure(bare),
         "with_brick": figure(bare - by), "change": spread(-by, 0.015)}
        for at, label in enumerate([*TASKS, sweep[1], nested])
        for task, bare in floors
        if task == "weather" or (label in TASKS and task != label)
        for by in [0.01 * (at - 1)]
    ]  # fmt: skip
    comparison = {
        "tasks": list(TASKS), "test_sets": 3, "individuals": {t: t for t in TASKS},
        "unrelated": ["weather"], "rows": rows, "groups": [],
        "winner": {
            "label": sweep[1], "runner_up": nested, "by": "mean", "lower_is_better": False,
            "figure": spread(plain[sweep[1]]), "margin": spread(sum(apart.values()) / 3, 0.005),
            "clear": True, "tasks": {t: spread(by, 0.01) for t, by in apart.items()},
            "method": "paired percentile bootstrap over test examples",
        },
        "curves": [{
            "parameter": "scale", "name": "λ (merge.scale)",
            "family": "merge(ties, [sentiment, topic, intent], scale=*)", "tasks": list(TASKS),
            "points": [
                {"x": x, "row": label, "mean": spread(plain[label]),
                 "validation": plain[label] + 0.01, "chosen": label == sweep[1]}
                for x, label in zip((0.5, 1.0, 1.5), sweep, strict=True)
            ],
        }],
        "similarity": {"labels": similar, "pairs": pairs},
        "orders": [{
            "row": nested, "reverse": "stitch([merge(linear, [topic, intent]), sentiment])",
            "effect": {"value": 0.21, "low": 0.21, "high": 0.21, "n": 90},
            "tasks": [
                {"task": t, "metric": "accuracy", "given": figure(values[nested][t]),
                 "reverse": figure(values[nested][t] - 0.04), "difference": spread(0.04)}
                for t in TASKS
            ],
        }],
        "forgetting": forgot,
        "lineage": {
            "nodes": nodes, "edges": [{"a": a, "b": b, "weight": w} for a, b, w in edges],
        },
        "reused": {"found": 3, "made": 21},
    }  # fmt: skip
    folder = out / "runs" / "compared"
    folder.mkdir(parents=True)
    record = _stored(
        folder,
        operation="compare",
        recipe="compare/bricks",
        name="compared",
        seed=0,
        config_hash="cc0011",
        backbone={"id": "minilm", "fingerprint": FINGERPRINT, "unchanged": True},
        cost={"seconds": 60.0},
        inputs={"backbone": FINGERPRINT, "data/topic/test": "ab" * 32},
        matrix=matrix,
        refitted=[
            {**one, "head": "head refitted"} for one in matrix
            if one["role"] != "floor" and one["brick"] not in (sweep[0], sweep[2])
        ],
        comparison=comparison,
    )  # fmt: skip
    return [record, *trained_bricks]


def found(out: Path, name: str = "tuned", *, adapts: bool = False) -> Record:
    """A merge of two bricks whose weights and λ were found; or adapted on test inputs."""
    say = "adapts on test inputs" if adapts else None
    axes = ["weight of topic", "weight of intent", "scale"]
    trials = []
    for at in range(27):
        point = [(0.0, 0.5, 1.0)[at // 9], (0.0, 0.5, 1.0)[at // 3 % 3], (0.3, 1.0, 2.0)[at % 3]]
        value = 0.9 - sum((x - best) ** 2 for x, best in zip(point, (0.5, 1, 1), strict=True)) / 8
        trials.append({
            "point": dict(zip(axes, point, strict=True)), "value": 1 - value if adapts else value,
            "scores": {"topic": value, "intent": value}, "penalty": 0.0,
        })  # fmt: skip
    cells = [cell(name, task, TASKS[task][0] - 0.02, "merged") for task in ("topic", "intent")]
    return new_record(
        operation="merge",
        recipe="merge/task_arithmetic",
        name=name,
        seed=0,
        config_hash=f"{abs(hash_of(name)):064x}",
        brick={"name": name, "version": "0a" * 6, "path": str(out), "parents": []},
        matrix=[{**one, "note": say} if say else one for one in cells],
        search={
            "method": "adamerging" if adapts else "grid",
            "objective": "entropy" if adapts else "metric",
            "chosen_on": "test inputs" if adapts else "validation",
            "note": say,
            "lower_is_better": adapts,
            "rows": {"topic": 200, "intent": 200},
            "axes": axes,
            "trials": trials,
            "chosen": next(i for i, one in enumerate(trials) if list(one["point"].values())
                           == [0.5, 1.0, 1.0]),
        },
    )  # fmt: skip
