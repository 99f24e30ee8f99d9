"""From records to what the dashboard shows: plain data, every figure as it stands in a record.

The page's script only draws what this module decides, so that what a person sees can be tested
without a browser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfm_train.data.tasks import LOWER_IS_BETTER
from cfm_train.tracking import comparison_view
from cfm_train.tracking.arms_view import arms
from cfm_train.tracking.lineage_view import lineage, link
from cfm_train.tracking.matrix_view import (
    COMPETES,
    distinct_labels,
    headline,
    maker_of,
    matrix_view,
)
from cfm_train.tracking.metrics_file import MetricsFile
from cfm_train.tracking.search_view import searches

Json = dict[str, Any]

#: Points of a curve that are kept; a screen has no more columns for one.
MOST_POINTS = 300


def view(records: Sequence[Mapping[str, Any]], folder: Path) -> Json:
    """Everything that the page draws.

    Args:
        records: valid records; ``folder`` in them says where ``curves`` and the record lie.
        folder: where the page will lie: links are relative to it.

    Returns:
        JSON-ready: runs, matrix, headline, checks, curves, costs, searches, arms, lineage, samples;
        and of a comparison itself and the matrix with refitted heads.
    """
    labels = distinct_labels([record["name"] for record in records], records)
    runs = [_run(at, r, labels[at], folder) for at, r in enumerate(records)]
    shown: Json = {"comparison": None, "refitted": None}
    at = comparison_view.find(records)
    if at is None:
        matrix = matrix_view(records)
        shown |= {"headline": headline(matrix, runs), "costs": _costs(matrix, runs)}
    else:
        told = comparison_view.comparison_view(records[at], records, folder)
        matrix = matrix_view(_alone(records, at, records[at]["matrix"]), told)
        costs = comparison_view.costs_of(told, matrix)
        first = comparison_view.headline_of(told, matrix, costs) or headline(matrix, runs)
        shown |= {"comparison": told, "headline": first, "costs": costs}
        if again := records[at].get("refitted"):
            floors = [cell for cell in records[at]["matrix"] if cell["role"] == "floor"]
            # Means of tasks that share their test rows are the ranking's alone.
            apart = told["test_sets"] == len(told["tasks"])
            shown["refitted"] = matrix_view(
                _alone(records, at, [*again, *floors]), tasks=told["tasks"] if apart else []
            )
    return {
        "runs": runs,
        "matrix": matrix,
        **shown,
        "checks": _checks(records),
        "curves": _curves(records, labels, folder),
        "searches": searches(records, labels),
        "arms": arms(records, labels),
        "lineage": lineage(records, folder),
        "samples": [{"run": at, **s} for at, r in enumerate(records) for s in r["samples"]],
        "lower_is_better": sorted(LOWER_IS_BETTER),
    }


def _alone(
    records: Sequence[Mapping[str, Any]], at: int, matrix: Sequence[Mapping[str, Any]]
) -> list[Json]:
    """The records with one matrix alone, that of record ``at``."""
    return [{**r, "matrix": matrix if n == at else []} for n, r in enumerate(records)]


def _run(at: int, record: Mapping[str, Any], label: str, folder: Path) -> Json:
    """One row of the table of runs."""
    brick, backbone = record["brick"], record["backbone"]
    own = {cell["metric"] for cell in record["matrix"] if cell["role"] in COMPETES}
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


def _checks(records: Sequence[Mapping[str, Any]]) -> list[Json]:
    """The checks of all runs, each once: a sequence repeats those of its steps."""
    steps = [at for at, record in enumerate(records) if record["operation"] != "sequence"]
    return [
        {"run": at, "name": name, **check}
        for at in steps or range(len(records))
        for name, check in records[at]["checks"].items()
    ]


def _costs(matrix: Json, runs: Sequence[Json]) -> list[Json]:
    """What each competing row costs, beside its cells: the points of the scatter."""
    points = []
    for number, row in enumerate(matrix["rows"]):
        run = maker_of(row, runs)
        if row["role"] in COMPETES and run is not None:
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
