"""What the page shows of a comparison: its figures, with links to the cards and what made each row.

A page has one comparison at most: that of its first record that holds one. The matrix is then that
record's alone; the other records are drawn for their training curves, costs and lineage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfm_train.tracking.lineage_view import link

Json = dict[str, Any]


def find(records: Sequence[Mapping[str, Any]]) -> int | None:
    """The number of the first record with a comparison."""
    return next((at for at, record in enumerate(records) if record.get("comparison")), None)


def told_by(comparison: Mapping[str, Any], rows: Sequence[Json]) -> None:
    """Puts what a comparison says of the rows of a matrix into them: averages, who competes."""
    told = {row["label"]: row for row in comparison["rows"]}
    groups = {f"{g['label']} · mean of {len(g['members'])} seeds": g for g in comparison["groups"]}
    for row in rows:
        known = groups.get(row["label"]) or told.get(row["label"])
        if known is None:
            continue
        row["mean"], row["normalised"] = known["mean"], known["normalised"]
        if known.get("note"):
            row["note"] = known["note"]
        if "competes" not in known:
            continue
        row["short"] = known["short"]
        if known["brick"]:
            row["version"] = known["brick"]["version"]
        if row["role"] in ("brick", "merged") and not known["competes"]:
            row["passed_over"] = True


def comparison_view(
    record: Mapping[str, Any], records: Sequence[Mapping[str, Any]], folder: Path
) -> Json:
    """The comparison as the page draws it.

    Args:
        record: the record that holds it.
        records: all records of the page.
        folder: where the page will lie: links are relative to it.

    Returns:
        The record's comparison; each row and part also has ``card`` (a link, or None), each row
        ``note`` (what has to be said beside its figures, or None); ``chosen_on`` is filled in from
        the record of the run that made it, where that is on the page.
    """
    found: Json = dict(record["comparison"])
    searches = {
        made["brick"]["version"]: made["search"]
        for made in records
        if made["brick"] is not None and made.get("search")
    }
    notes = {cell["brick"]: cell["note"] for cell in record["matrix"] if cell.get("note")}
    rows = []
    for row in found["rows"]:
        brick = row["brick"]
        search = searches.get(brick["version"], {}) if brick else {}
        rows.append({
            **row,
            "card": _card(brick, folder),
            "parts": [{**part, "card": _card(part, folder)} for part in row["parts"]],
            "chosen_on": row["chosen_on"] or search.get("chosen_on"),
            "note": notes.get(row["label"]) or search.get("note"),
        })  # fmt: skip
    winner = found["winner"]
    if winner is not None:
        grouped = {group["label"]: group for group in found["groups"]}
        winner = {**winner, "seeds": len(grouped.get(winner["label"], {}).get("members", ()))}
    inputs = {key: value[:12] for key, value in record["inputs"].items()}
    return {**found, "rows": rows, "winner": winner, "inputs": inputs}


def _card(part: Mapping[str, Any] | None, folder: Path) -> str | None:
    if part is None or part["path"] is None:
        return None
    return link(Path(part["path"]) / "brick.json", folder)


def headline_of(comparison: Mapping[str, Any], matrix: Json, costs: Sequence[Json]) -> Json | None:
    """The winner with its margin, as the page's headline.

    Args:
        comparison: as `comparison_view` gives it.
        matrix: the page's matrix.
        costs: what the rows cost.
    """
    winner = comparison["winner"]
    if winner is None:
        return None
    many = winner["seeds"]
    label = f"{winner['label']} · mean of {many} seeds" if many else winner["label"]
    at = next(n for n, row in enumerate(matrix["rows"]) if row["label"] == label)
    by = winner["by"]
    bounds = {
        role: [row[by] for row in comparison["rows"] if row["role"] == role and row[by]]
        for role in ("floor", "ceiling")
    }
    pick = min if winner["lower_is_better"] else max
    strictest = {
        role: pick(found, key=lambda figure: figure["value"], default=None)
        for role, found in bounds.items()
    }
    columns = [
        number for number, task in enumerate(matrix["tasks"]) if task["task"] in comparison["tasks"]
    ]
    if strictest["ceiling"] is None and by == "mean":
        strictest["ceiling"] = _individuals(comparison, matrix)
    return {
        "kind": "one",
        **winner,
        "label": label,
        "row": at,
        "columns": columns,
        "of": sum(row["competes"] for row in comparison["rows"])
        - sum(len(group["members"]) - 1 for group in comparison["groups"]),
        "seeds": many or None,
        **strictest,
        "run": None,
        "cost": next((point["cost"] for point in costs if point["row"] == at), None),
    }


def costs_of(comparison: Mapping[str, Any], matrix: Json) -> list[Json]:
    """What every row that competes takes: parameters, bytes, and the seconds of making it."""
    told = {row["label"]: row for row in comparison["rows"]}
    points = []
    for number, row in enumerate(matrix["rows"]):
        known = told.get(row["label"])
        if known is None or not known["competes"]:
            continue
        cost = {key: known[key] for key in ("parameters", "bytes", "seconds")}
        cost["make_seconds"] = cost.pop("seconds")
        points.append({
            "row": number, "run": None, "cost": cost, "seconds_of": known["seconds_of"],
            "card": known["card"],
        })  # fmt: skip
    return points


def _individuals(comparison: Mapping[str, Any], matrix: Json) -> Json | None:
    """The mean of each task's individual brick; None where one is missing or test rows are shared.

    Only the value is shown, so that it comes without an interval of its own.
    """
    rows = {row["label"]: row for row in matrix["rows"]}
    own = comparison["individuals"]
    if len(own) < len(comparison["tasks"]) or comparison["test_sets"] < len(own):
        return None
    tasks = [task["task"] for task in matrix["tasks"]]
    cells = [rows[label]["cells"][tasks.index(task)] for task, label in own.items()]
    value = sum(cell["value"] for cell in cells) / len(cells)
    return {"value": value, "low": value, "high": value, "n": sum(cell["n"] for cell in cells)}
