"""What a comparison shows, as tables and charts for W&B: the same figures as on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cfm_train.tracking.wandb_run import WandbRun

Table = tuple[list[str], list[list[Any]]]
Json = Mapping[str, Any]

_ENDS = ("value", "low", "high")
#: Columns of a table of cells.
CELL = ("brick", "task", "metric", "value", "low", "high", "n", "role", "head", "source", "note")


def send(
    wandb: WandbRun, matrix: Sequence[Json], refitted: Sequence[Json], comparison: Json
) -> None:
    """Logs every table and chart.

    Args:
        wandb: the run.
        matrix: cells of the matrix.
        refitted: cells of the table with refitted heads.
        comparison: the ``comparison`` of the record.
    """
    found = tables(matrix, refitted, comparison)
    for name, table in found.items():
        if table[1]:
            wandb.table(name, *table)
    if found["ranking"][1]:
        by = "normalised" if any(r["normalised"] for r in comparison["rows"]) else "mean"
        wandb.chart("charts/ranking", "bar", *found["ranking"], x="row", y=by,
                    title=f"{by} over tasks, higher is better")  # fmt: skip
        wandb.chart("charts/cost", "scatter", *found["ranking"], x="parameters", y=by,
                    title=f"parameters against {by}")  # fmt: skip
    for number, curve in enumerate(comparison["curves"]):
        columns = [curve["name"], "mean on test"]
        rows = [[p["x"], p["mean"]["value"]] for p in curve["points"] if p["mean"]]
        if rows:
            wandb.chart(f"charts/curve {number + 1}", "line", columns, rows, x=columns[0],
                        y=columns[1], title=curve["family"])  # fmt: skip


def tables(matrix: Sequence[Json], refitted: Sequence[Json], comparison: Json) -> dict[str, Table]:
    """Every table by name: its columns and rows."""
    return {
        "matrix": cells(matrix),
        "matrix_refitted": cells(refitted),
        "ranking": _ranking(comparison),
        "curves": (
            ["family", "parameter", "x", "row", "mean", "low", "high", "validation", "chosen"],
            [
                [curve["family"], curve["parameter"], point["x"], point["row"],
                 *_ends(point["mean"]), point["validation"], point["chosen"]]
                for curve in comparison["curves"]
                for point in curve["points"]
            ],
        ),
        "similarity": _similarity(comparison["similarity"]),
        "order_effects": (
            ["row", "reverse", "effect", "task", "metric", "given", "reverse score", "difference",
             "low", "high"],
            [
                [order["row"], order["reverse"], order["effect"]["value"], one["task"],
                 one["metric"], one["given"]["value"], one["reverse"]["value"],
                 *_ends(one["difference"])]
                for order in comparison["orders"]
                for one in order["tasks"]
            ],
        ),
        "forgetting": (
            ["row", "task", "metric", "bare", "with brick", "change", "low", "high"],
            [
                [one["row"], one["task"], one["metric"], one["bare"]["value"],
                 one["with_brick"]["value"], *_ends(one["change"])]
                for one in comparison["forgetting"]
            ],
        ),
        "winner": _winner(comparison["winner"]),
        "lineage": (
            ["from", "to", "weight"],
            [[edge["a"], edge["b"], edge["weight"]] for edge in comparison["lineage"]["edges"]],
        ),
    }  # fmt: skip


def cells(found: Sequence[Json]) -> Table:
    """Cells as the columns and rows of a table."""
    return list(CELL), [[cell.get(column) for column in CELL] for cell in found]


def _ranking(comparison: Json) -> Table:
    columns = ["row", "role", "competes", "mean", "mean low", "mean high", "normalised",
               "normalised low", "normalised high", "parameters", "bytes", "seconds", "seconds of",
               "chosen on", "expression"]  # fmt: skip
    rows = [
        [row["label"], row["role"], row["competes"], *_ends(row["mean"]), *_ends(row["normalised"]),
         row["parameters"], row["bytes"], row["seconds"], row["seconds_of"], row["chosen_on"],
         row["expression"]]
        for row in comparison["rows"]
    ]  # fmt: skip
    for group in comparison["groups"]:
        figures = [*_ends(group["mean"]), *_ends(group["normalised"])]
        about = ", ".join(group["members"])
        rows.append(
            [f"{group['label']} · mean of {len(group['members'])} seeds", "seeds", True, *figures,
             None, None, None, None, None, about]
        )  # fmt: skip
    return columns, rows


def _similarity(similarity: Json | None) -> Table:
    columns = ["a", "b", "of", "cosine", "sign_conflict", "weighted_conflict", "reason"]
    pairs = similarity["pairs"] if similarity else []
    return columns, [[pair[column] for column in columns] for pair in pairs]


def _winner(winner: Json | None) -> Table:
    columns = ["winner", "runner-up", "over", "margin", "low", "high", "clear", "method"]
    if winner is None:
        return columns, []
    over = {winner["by"]: winner["margin"], **winner["tasks"]}
    names = winner["label"], winner["runner_up"]
    return columns, [
        [*names, what, *_ends(margin), margin["low"] > 0, winner["method"]]
        for what, margin in over.items()
    ]


def _ends(figure: Json | None) -> list[Any]:
    return [None if figure is None else figure[key] for key in _ENDS]
