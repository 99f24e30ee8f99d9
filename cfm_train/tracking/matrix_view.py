"""The brick × task matrix of records, and the headline that it comes to.

How figures meet:

- Rows of the matrix are bricks. Where runs of one name disagree on a task (seeds, settings), each
  gets a row of its own, named by its seed or its config hash. Runs that differ by their seed alone
  also get a row of their mean, which competes in their place (`seed_groups`); no other figures are
  averaged over runs.
- Bounds are shared: where several runs measured the same bound, the strictest one stands.
- Where no upper bound was measured, a row that was made from bricks is held against the best brick
  of each task.
- A mean over tasks has the interval of a mean of independent figures (the tasks' test sets are).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cfm_train.data.tasks import LOWER_IS_BETTER
from cfm_train.evaluation.seeds import over_seeds
from cfm_train.tracking.comparison_view import told_by
from cfm_train.tracking.seed_groups import READERS, families, with_groups

Json = dict[str, Any]

#: Roles whose rows can win; the others are bounds.
COMPETES = ("brick", "merged")
_ROLE_ORDER = {"brick": 0, "merged": 1, "ceiling": 2, "floor": 3}


def distinct_labels(names: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each record that no other has: with its seed or config hash where it takes one."""
    labels = []
    grouped = set(families(records).values())
    for name, record in zip(names, records, strict=True):
        same = [r for n, r in zip(names, records, strict=True) if n == name]
        if len(same) == 1:
            labels.append(name)
        elif len({r["seed"] for r in same}) == len(same):
            labels.append(f"{name} · seed {record['seed']}")
        elif record.get("seedless_hash") in grouped:  # several settings, each with several seeds
            labels.append(f"{name} · {record['seedless_hash'][:6]} · seed {record['seed']}")
        else:
            labels.append(f"{name} · {record['config_hash'][:6]}")
    return labels


def matrix_view(
    records: Sequence[Mapping[str, Any]],
    comparison: Mapping[str, Any] | None = None,
    tasks: Sequence[str] | None = None,
) -> Json:
    """The brick × task matrix of some records.

    Args:
        records: records; only what says which brick they made with which seed is read of them,
            and ``matrix``.
        comparison: the ``comparison`` of a record: averages, seeds and who competes are then its.
        tasks: those that means are over; None for all.

    Returns:
        ``tasks`` (the columns), ``rows`` (label, brick, role, cells, mean, runs; a cell or None for
        each column; ``members`` and ``part`` as `with_groups` has them), and ``best``: for each
        column the number of the row that wins it.
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
        if cell.get("note"):
            row["note"] = cell["note"]
        column = columns.index((cell["task"], cell["metric"]))
        other = row["cells"].get(column)
        if other is None or (cell["role"] not in COMPETES and _better(cell, other)):
            row["cells"][column] = cell
    names = list(dict.fromkeys(cell["brick"] for _, cell in found))  # a brick's runs stand together
    ordered = sorted(
        rows.values(), key=lambda row: (_ROLE_ORDER[row["role"]], names.index(row["brick"]))
    )
    for row in ordered:
        row["cells"] = [_figure(row["cells"].get(column)) for column in range(len(columns))]
    ordered = with_groups(ordered, records, comparison)
    for number, row in enumerate(ordered):
        row["mean"] = _mean(ordered, number, columns, tasks)
    if comparison is not None:
        told_by(comparison, ordered)
    best = []
    for at, (_, metric) in enumerate(columns):
        rivals = [
            (number, row["cells"][at])
            for number, row in enumerate(ordered)
            if competes(row) and row["cells"][at]
        ]
        best.append(_best(rivals, metric))
    heads = [
        {"task": task, "metric": metric, "lower_is_better": metric in LOWER_IS_BETTER}
        for task, metric in columns
    ]
    return {"tasks": heads, "rows": ordered, "best": best}


def _row_names(
    found: Sequence[tuple[int, Mapping[str, Any]]], records: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The row of each cell: the brick's name, split by run where runs of that name disagree."""
    values: dict[tuple[str, str, str], set[float]] = {}
    for _, cell in found:
        key = (cell["brick"], cell["task"], cell["metric"])
        values.setdefault(key, set()).add(cell["value"])
    split = {brick for (brick, _, _), seen in values.items() if len(seen) > 1}
    split |= {records[at]["brick"]["name"] for at in families(records)}
    names = [cell["brick"] for _, cell in found]
    for brick in split:
        runs = sorted({at for at, cell in found if cell["brick"] == brick})
        labels = distinct_labels([brick] * len(runs), [records[at] for at in runs])
        of_run = dict(zip(runs, labels, strict=True))
        for number, (at, cell) in enumerate(found):
            if cell["brick"] == brick and cell["role"] in COMPETES:
                names[number] = of_run[at]
    return names


def competes(row: Mapping[str, Any]) -> bool:
    """Whether a row can win: it is no bound, no seed of a group, and was not passed over."""
    return row["role"] in COMPETES and not row.get("part") and not row.get("passed_over")


def headline(matrix: Json, runs: Sequence[Json]) -> Json | None:
    """The winner; or, where no brick stands on two of several tasks, the best of each task."""
    tasks, rows = matrix["tasks"], matrix["rows"]
    rivals = [(at, row) for at, row in enumerate(rows) if competes(row)]
    if not rivals:
        return None
    widest = max(sum(cell is not None for cell in row["cells"]) for _, row in rivals)
    mixed = len({task["lower_is_better"] for task in tasks}) > 1  # a mean would mean nothing
    if len(tasks) > 1 and (widest < 2 or mixed):
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
    maker = maker_of(rows[winner["row"]], runs)
    return {"kind": "one", **winner, "run": maker and maker["run"], "of": len(rivals)}


def maker_of(row: Json, runs: Sequence[Json]) -> Json | None:
    """The run that made a row's brick; None where no run here did, or several may have."""
    own = [run for run in runs if run["operation"] not in READERS and run["brick"]]
    if "version" in row:  # a comparison says which version it is
        makers = [run for run in own if run["brick"]["version"] == row["version"]]
        return makers[0] if makers else None
    makers = [run for run in own if run["brick"]["name"] == row["brick"]]
    near = [run for run in makers if run["run"] in row["runs"]]
    found = near or makers
    return found[0] if len(found) == 1 else None


def _against(matrix: Json, at: int, columns: Sequence[int]) -> Json:
    """A row's figure over some columns, beside the same of the strictest floor and ceiling."""
    rows = matrix["rows"]
    entry: Json = {"row": at, "label": rows[at]["label"], "columns": list(columns)}
    entry["figure"] = _of_row(rows, at, columns)
    entry["seeds"] = len(rows[at].get("members", ())) or None
    for role in ("floor", "ceiling"):
        bounds = [
            _over([row["cells"][column] for column in columns])
            for row in rows
            if row["role"] == role and all(row["cells"][column] for column in columns)
        ]
        lower = _lower(columns, matrix["tasks"])
        strictest = min if lower else max
        entry[role] = strictest(bounds, key=lambda figure: figure["value"], default=None)
    if entry["ceiling"] is None and rows[at]["role"] == "merged":
        single = [_best_brick(matrix, column) for column in columns]
        entry["ceiling"] = _over(single) if all(single) else None
    return entry


def _best_brick(matrix: Json, column: int) -> Json | None:
    cells = [r["cells"][column] for r in matrix["rows"] if r["role"] == "brick" and competes(r)]
    pick = min if matrix["tasks"][column]["lower_is_better"] else max
    measured: list[Json] = [cell for cell in cells if cell]
    return pick(measured, key=lambda cell: cell["value"], default=None)


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


def _figure(cell: Mapping[str, Any] | None) -> Json | None:
    """What is shown of a cell: the figure, and whose head answered where the record says so."""
    if cell is None:
        return None
    own = {"head": cell["head"]} if cell.get("head") is not None else {}
    return {key: cell[key] for key in ("value", "low", "high", "n")} | own


def _better(cell: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    lower = cell["metric"] in LOWER_IS_BETTER
    return bool(cell["value"] < other["value"] if lower else cell["value"] > other["value"])


def _best(rivals: Sequence[tuple[int, Json]], metric: str) -> int | None:
    if not rivals:
        return None
    pick = min if metric in LOWER_IS_BETTER else max
    return pick(rivals, key=lambda pair: pair[1]["value"])[0]


def _mean(
    rows: Sequence[Json],
    at: int,
    columns: Sequence[tuple[str, str]],
    tasks: Sequence[str] | None,
) -> Json | None:
    """The mean over tasks, for a row that has them all and metrics that can be added."""
    chosen = [n for n, (task, _) in enumerate(columns) if tasks is None or task in tasks]
    cells = [rows[at]["cells"][n] for n in chosen]
    added = not LOWER_IS_BETTER.intersection(columns[n][1] for n in chosen)
    return _of_row(rows, at, chosen) if len(cells) > 1 and all(cells) and added else None


def _of_row(rows: Sequence[Json], at: int, columns: Sequence[int]) -> Json:
    """A row's mean over some columns; of a group over its seeds' own means."""
    if members := rows[at].get("members"):
        return over_seeds([_of_row(rows, member, columns)["value"] for member in members])
    return _over([rows[at]["cells"][column] for column in columns])


def _over(cells: Iterable[Json | None]) -> Json:
    """The mean of independent figures, with half-widths that add in squares."""
    figures = [cell for cell in cells if cell is not None]
    count = len(figures)
    value = sum(figure["value"] for figure in figures) / count
    below = math.hypot(*(figure["value"] - figure["low"] for figure in figures)) / count
    above = math.hypot(*(figure["high"] - figure["value"] for figure in figures)) / count
    n = sum(figure["n"] for figure in figures)
    return {"value": value, "low": value - below, "high": value + above, "n": n}
