"""From records to what the dashboard shows: plain data, every figure as it stands in a record.

The page's script only draws what this module decides, so that what a person sees can be tested
without a browser. How figures meet:

- Rows of the matrix are bricks. Where runs of one name disagree on a task (seeds, settings), each
  gets a row of its own, named by its seed or its config hash; figures are never averaged over runs.
- Bounds are shared: where several runs measured the same bound, the strictest one stands.
- A mean over tasks has the interval of a mean of independent figures (the tasks' test sets are).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cfm_train.evaluation.metrics import LOWER_IS_BETTER
from cfm_train.tracking.lineage_view import lineage, link
from cfm_train.tracking.metrics_file import MetricsFile

Json = dict[str, Any]

#: Points of a curve that are kept; a screen has no more columns for one.
MOST_POINTS = 300

_COMPETES = ("brick", "merged")
_ROLE_ORDER = {"brick": 0, "merged": 1, "ceiling": 2, "floor": 3}


def view(records: Sequence[Mapping[str, Any]], folder: Path) -> Json:
    """Everything that the page draws.

    Args:
        records: valid records; ``folder`` in them says where ``curves`` and the record lie.
        folder: where the page will lie: links are relative to it.

    Returns:
        JSON-ready: runs, matrix, headline, checks, curves, costs, lineage, samples.
    """
    labels = _labels([record["name"] for record in records], records)
    runs = [_run(at, r, labels[at], folder) for at, r in enumerate(records)]
    matrix = matrix_view(records)
    return {
        "runs": runs,
        "matrix": matrix,
        "headline": _headline(matrix, runs),
        "checks": [
            {"run": at, "name": name, **check}
            for at, record in enumerate(records)
            for name, check in record["checks"].items()
        ],
        "curves": _curves(records, labels, folder),
        "costs": _costs(matrix, runs),
        "lineage": lineage(records, folder),
        "samples": [{"run": at, **s} for at, r in enumerate(records) for s in r["samples"]],
        "lower_is_better": sorted(LOWER_IS_BETTER),
    }


def _labels(names: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each record that no other has: with its seed or config hash where it takes one."""
    labels = []
    for name, record in zip(names, records, strict=True):
        same = [r for n, r in zip(names, records, strict=True) if n == name]
        if len(same) == 1:
            labels.append(name)
        elif len({r["seed"] for r in same}) == len(same):
            labels.append(f"{name} · seed {record['seed']}")
        else:
            labels.append(f"{name} · {record['config_hash'][:6]}")
    return labels


def _run(at: int, record: Mapping[str, Any], label: str, folder: Path) -> Json:
    """One row of the table of runs."""
    brick, backbone = record["brick"], record["backbone"]
    own = {cell["metric"] for cell in record["matrix"] if cell["role"] in _COMPETES}
    keys = [key for key in record["metrics"] if key.startswith("test/")]
    first = next((key for key in keys if key.rsplit("/", 1)[-1] in own), keys[0] if keys else None)
    home = record.get("folder")
    return {
        "run": at,
        "label": label,
        **{key: record[key] for key in ("name", "operation", "recipe", "status", "seed")},
        "error": record.get("error"),
        "config_hash": record["config_hash"],
        "backbone": backbone and {**backbone},
        "brick": brick
        and {
            "name": brick["name"],
            "version": brick["version"],
            "card": link(Path(brick["path"]) / "brick.json", folder),
        },
        "record": link(Path(home) / "record.json", folder) if home else "record.json",
        "figure": first and {"key": first, **record["metrics"][first]},
        "metrics": record["metrics"],
        "cost": record["cost"],
        "data": record["data"],
        "wandb": record["wandb"],
    }


def matrix_view(records: Sequence[Mapping[str, Any]]) -> Json:
    """The brick × task matrix of some records.

    Args:
        records: records; only ``matrix``, ``seed`` and ``config_hash`` of them are read.

    Returns:
        ``tasks`` (the columns), ``rows`` (label, brick, role, cells, mean, runs; a cell or None for
        each column), and ``best``: for each column the number of the row that wins it.
    """
    found = [(at, cell) for at, record in enumerate(records) for cell in record["matrix"]]
    columns = list(dict.fromkeys((cell["task"], cell["metric"]) for _, cell in found))
    rows: dict[tuple[str, str], Json] = {}
    for (at, cell), name in zip(found, _row_names(found, records), strict=True):
        row = rows.setdefault(
            (cell["role"], name),
            {"label": name, "brick": cell["brick"], "role": cell["role"], "cells": {}, "runs": []},
        )
        row["runs"] = list(dict.fromkeys([*row["runs"], at]))
        column = columns.index((cell["task"], cell["metric"]))
        other = row["cells"].get(column)
        if other is None or (cell["role"] not in _COMPETES and _better(cell, other)):
            row["cells"][column] = cell
    names = list(dict.fromkeys(cell["brick"] for _, cell in found))  # a brick's runs stand together
    ordered = sorted(
        rows.values(), key=lambda row: (_ROLE_ORDER[row["role"]], names.index(row["brick"]))
    )
    for row in ordered:
        row["cells"] = [_figure(row["cells"].get(column)) for column in range(len(columns))]
        row["mean"] = _mean(row["cells"], [metric for _, metric in columns])
    best = []
    for at, (_, metric) in enumerate(columns):
        rivals = [
            (number, row["cells"][at])
            for number, row in enumerate(ordered)
            if row["role"] in _COMPETES and row["cells"][at]
        ]
        best.append(_best(rivals, metric))
    tasks = [
        {"task": task, "metric": metric, "lower_is_better": metric in LOWER_IS_BETTER}
        for task, metric in columns
    ]
    return {"tasks": tasks, "rows": ordered, "best": best}


def _row_names(
    found: Sequence[tuple[int, Mapping[str, Any]]], records: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The row of each cell: the brick's name, split by run where runs of that name disagree."""
    values: dict[tuple[str, str, str], set[float]] = {}
    for _, cell in found:
        key = (cell["brick"], cell["task"], cell["metric"])
        values.setdefault(key, set()).add(cell["value"])
    split = {brick for (brick, _, _), seen in values.items() if len(seen) > 1}
    names = [cell["brick"] for _, cell in found]
    for brick in split:
        runs = sorted({at for at, cell in found if cell["brick"] == brick})
        labels = _labels([brick] * len(runs), [records[at] for at in runs])
        of_run = dict(zip(runs, labels, strict=True))
        for number, (at, cell) in enumerate(found):
            if cell["brick"] == brick and cell["role"] in _COMPETES:
                names[number] = of_run[at]
    return names


def _headline(matrix: Json, runs: Sequence[Json]) -> Json | None:
    """The winner; or, where no brick stands on two of several tasks, the best of each task."""
    tasks, rows = matrix["tasks"], matrix["rows"]
    rivals = [(at, row) for at, row in enumerate(rows) if row["role"] in _COMPETES]
    if not rivals:
        return None
    widest = max(sum(cell is not None for cell in row["cells"]) for _, row in rivals)
    if widest < 2 and len(tasks) > 1:
        each = [
            {
                **_against(matrix, best, [at]),
                "of": sum(row["cells"][at] is not None for _, row in rivals),
            }
            for at, best in enumerate(matrix["best"])
            if best is not None
        ]
        return {"kind": "each", "winners": each}
    rivals = [(at, row) for at, row in rivals if sum(c is not None for c in row["cells"]) == widest]
    if len(tasks) > 1:
        entries = [_against(matrix, at, _covered(row)) for at, row in rivals]
        winner = max(entries, key=_merit_among(entries, tasks))
    else:
        winner = _against(matrix, matrix["best"][0], [0])
    row = rows[winner["row"]]
    made = [runs[at] for at in row["runs"] if (runs[at]["brick"] or {}).get("name") == row["brick"]]
    maker = next(iter(sorted(made, key=lambda run: run["operation"] == "evaluate")), None)
    return {"kind": "one", **winner, "run": maker and maker["run"], "of": len(rivals)}


def _against(matrix: Json, at: int, columns: Sequence[int]) -> Json:
    """A row's figure over some columns, beside the same of the strictest floor and ceiling."""
    rows = matrix["rows"]
    entry: Json = {"row": at, "label": rows[at]["label"], "columns": list(columns)}
    entry["figure"] = _over([rows[at]["cells"][column] for column in columns])
    for role in ("floor", "ceiling"):
        bounds = [
            _over([row["cells"][column] for column in columns])
            for row in rows
            if row["role"] == role and all(row["cells"][column] for column in columns)
        ]
        lower = _lower(columns, matrix["tasks"])
        strictest = min if lower else max
        entry[role] = strictest(bounds, key=lambda figure: figure["value"], default=None)
    return entry


def _merit_among(entries: Sequence[Json], tasks: Sequence[Json]) -> Callable[[Json], float]:
    """How to rank rows: those on different tasks by their gain over the bare backbone."""
    gains = all(entry["floor"] for entry in entries)

    def merit(entry: Json) -> float:
        value = entry["figure"]["value"] - (entry["floor"]["value"] if gains else 0.0)
        return float(-value if _lower(entry["columns"], tasks) else value)

    return merit


def _lower(columns: Sequence[int], tasks: Sequence[Json]) -> bool:
    return all(tasks[column]["lower_is_better"] for column in columns)


def _covered(row: Json) -> list[int]:
    return [at for at, cell in enumerate(row["cells"]) if cell is not None]


def _costs(matrix: Json, runs: Sequence[Json]) -> list[Json]:
    """What each competing row costs, beside its cells: the points of the scatter."""
    points = []
    for number, row in enumerate(matrix["rows"]):
        makers = [at for at in row["runs"] if (runs[at]["brick"] or {}).get("name") == row["brick"]]
        makers.sort(key=lambda at: runs[at]["operation"] == "evaluate")
        if row["role"] in _COMPETES and makers:
            run = runs[makers[0]]
            points.append({"row": number, "run": run["run"], "cost": run["cost"]})
    return points


def _curves(
    records: Sequence[Mapping[str, Any]], labels: Sequence[str], folder: Path
) -> list[Json]:
    """Every numeric series of every ``metrics.jsonl``, by key, thinned to ``MOST_POINTS``."""
    curves: dict[str, list[Json]] = {}
    for at, record in enumerate(records):
        if record["curves"] is None:
            continue
        path = Path(record.get("folder") or folder) / record["curves"]
        series: dict[str, list[list[float]]] = {}
        for row in MetricsFile(path).rows():
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                    series.setdefault(key, []).append([row["step"], value])
        for key, points in series.items():
            entry = {"run": at, "label": labels[at], "points": thin(points)}
            curves.setdefault(key, []).append(entry)
    return [{"key": key, "series": curves[key]} for key in sorted(curves, key=_curve_order)]


def _curve_order(key: str) -> tuple[int, str]:
    ranks = ("train/loss", "train/learning_rate", "validation/")
    return next((at for at, start in enumerate(ranks) if key.startswith(start)), len(ranks)), key


def thin(points: Sequence[Sequence[float]], most: int = MOST_POINTS) -> list[list[float]]:
    """Keeps at most ``most`` points of a curve: lowest and highest of each stretch, and both ends.

    Args:
        points: ``[step, value]`` in order of steps.
        most: how many may stay.

    Returns:
        Points that were measured; none is averaged, so spikes stay in sight.
    """
    if len(points) <= most:
        return [list(point) for point in points]
    kept = {0, len(points) - 1}
    stretches = (most - 2) // 2
    for stretch in range(stretches):
        start = stretch * len(points) // stretches
        part = range(start, max(start + 1, (stretch + 1) * len(points) // stretches))
        kept |= {pick(part, key=lambda at: points[at][1]) for pick in (min, max)}
    return [list(points[at]) for at in sorted(kept)]


def _figure(cell: Mapping[str, Any] | None) -> Json | None:
    return None if cell is None else {key: cell[key] for key in ("value", "low", "high", "n")}


def _better(cell: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    lower = cell["metric"] in LOWER_IS_BETTER
    return bool(cell["value"] < other["value"] if lower else cell["value"] > other["value"])


def _best(rivals: Sequence[tuple[int, Json]], metric: str) -> int | None:
    if not rivals:
        return None
    pick = min if metric in LOWER_IS_BETTER else max
    return pick(rivals, key=lambda pair: pair[1]["value"])[0]


def _mean(cells: Sequence[Json | None], metrics: Sequence[str]) -> Json | None:
    """The mean over all tasks, for a row that has them all and metrics that can be added."""
    whole = len(cells) > 1 and all(cells) and not LOWER_IS_BETTER.intersection(metrics)
    return _over(cells) if whole else None


def _over(cells: Iterable[Json | None]) -> Json:
    """The mean of independent figures, with half-widths that add in squares."""
    figures = [cell for cell in cells if cell is not None]
    count = len(figures)
    value = sum(figure["value"] for figure in figures) / count
    below = math.hypot(*(figure["value"] - figure["low"] for figure in figures)) / count
    above = math.hypot(*(figure["high"] - figure["value"] for figure in figures)) / count
    n = sum(figure["n"] for figure in figures)
    return {"value": value, "low": value - below, "high": value + above, "n": n}
