"""Searches of records as the page draws them: what was tried along each axis, and what was best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]

#: With more different values than this an axis is drawn as points alone.
MOST_VALUES = 24


def searches(records: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[Json]:
    """One entry for each record with found weights.

    Args:
        records: valid records.
        labels: of the runs.

    Returns:
        Method, objective, the rows that decided, the best trial, and for each axis that was varied
        the trials' points ``[x, value]``, and a line through the best of each x.
    """
    return [
        _search(at, record["search"], labels[at])
        for at, record in enumerate(records)
        if "search" in record
    ]


def _search(at: int, search: Mapping[str, Any], label: str) -> Json:
    trials = search["trials"]
    best = trials[search["chosen"]]
    # Weights layer by layer are too many to be drawn one by one: a heat map of the record has them.
    names = [name for name in search["axes"] if ", layer " not in name]
    axes = [_axis(name, trials, best, bool(search["lower_is_better"])) for name in names]
    kept = ("method", "objective", "chosen_on", "note", "lower_is_better", "rows")
    return {
        "run": at,
        "label": label,
        **{key: search[key] for key in kept},
        "tried": len(trials),
        "trial": search["chosen"] + 1,
        "value": best["value"],
        "point": {name: best["point"][name] for name in names},
        "axes": [axis for axis in axes if len({x for x, _ in axis["points"]}) > 1],
    }


def _axis(name: str, trials: Sequence[Mapping[str, Any]], best: Json | Any, lower: bool) -> Json:
    points = sorted([trial["point"][name], trial["value"]] for trial in trials)
    each: dict[float, float] = {}
    for x, value in points:
        each[x] = (min if lower else max)(each.get(x, value), value)
    line = [[x, value] for x, value in each.items()] if len(each) <= MOST_VALUES else []
    return {
        "name": name,
        "points": points,
        "line": line,
        "chosen": [best["point"][name], best["value"]],
    }
