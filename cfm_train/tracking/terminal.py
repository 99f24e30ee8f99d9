"""What a run prints at its end: the brick × task matrix and a summary; plain text into a pipe."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cfm_train.data.tasks import LOWER_IS_BETTER
from cfm_train.tracking.arms_view import arms
from cfm_train.tracking.matrix_view import competes, matrix_view

_WIDTH = 500  # where nobody looks on: a pipe or a file
#: With more figures than this the matrix says more than their list.
_MOST_FIGURES = 12
_SECTIONS = {"brick": "", "merged": "", "ceiling": "upper bound", "floor": "lower bound"}


def print_matrix(cells: Sequence[Mapping[str, Any]], *, file: IO[str] | None = None) -> None:
    """Prints the brick × task matrix; the best of each column is bold, intervals are dim.

    Args:
        cells: cells as in the record's ``matrix``.
        file: where to; standard output by default. Where it is no terminal: plain text, the best
            of each column, or all that share the best score, marked with ``*``.
    """
    if cells:
        console = _console(file)
        console.print(matrix_table(cells, plain=not console.is_terminal))


def matrix_table(cells: Sequence[Mapping[str, Any]], *, plain: bool = False) -> Table:
    """The matrix as a rich table."""
    matrix = matrix_view([{"matrix": cells, "seed": 0, "config_hash": ""}])
    table = _table(plain)
    table.add_column("")
    for task in matrix["tasks"]:
        table.add_column(f"{task['task']}\n{task['metric'].replace('_', ' ')}", justify="right")
    best = _best_scores(matrix)
    role = None
    for row in matrix["rows"]:
        if role is not None and row["role"] != role:
            table.add_section()
        role = row["role"]
        name = Text(row["label"])
        if _SECTIONS[role]:
            name.append(f" ({_SECTIONS[role]})", "dim")
        if row.get("note"):
            name.append(f" ({row['note']})", "dim")
        texts = []
        for task, cell, top in zip(matrix["tasks"], row["cells"], best, strict=True):
            wins = bool(cell) and cell["value"] == top and competes(row)
            texts.append(_cell(cell, task["metric"], wins=wins, plain=plain))
        table.add_row(name, *texts)
    if plain and any(top is not None for top in best):
        table.caption, table.caption_justify = "* best of its column", "left"
    return table


def _best_scores(matrix: Mapping[str, Any]) -> list[float | None]:
    """The score to beat in each column; None where fewer than two rows compete."""
    rows = matrix["rows"]
    rivals = [
        sum(competes(row) and row["cells"][at] is not None for row in rows)
        for at in range(len(matrix["tasks"]))
    ]
    return [
        rows[best]["cells"][at]["value"] if rivals[at] > 1 else None
        for at, best in enumerate(matrix["best"])
    ]


def print_run(record: Mapping[str, Any], *, file: IO[str] | None = None) -> None:
    """Prints what a run came to: its figures, what it cost, and its checks.

    Args:
        record: a valid record.
        file: where to; standard output by default.
    """
    console = _console(file)
    body = Group(*_summary(record, plain=not console.is_terminal))
    title = f"{record['name']} · {record['recipe']} · seed {record['seed']} · {record['status']}"
    if console.is_terminal:
        colour = "green" if record["status"] == "done" else "red"
        console.print(Panel(body, title=Text(title), title_align="left", border_style=colour))
    else:
        console.print(Text(title))
        console.print(body)


def score_text(value: float, metric: str) -> str:
    """A score times 100 with one decimal; a loss, perplexity or error as it is, to three digits."""
    if metric not in LOWER_IS_BETTER:
        return f"{100 * value:.1f}"
    decimals = 2 - math.floor(math.log10(abs(value) or 1))
    return f"{value:.{min(6, max(0, decimals))}f}" if abs(value) < 1e6 else f"{value:.2e}"


def _summary(record: Mapping[str, Any], *, plain: bool) -> list[Any]:
    parts: list[Any] = []
    if record.get("error"):
        parts.append(Text(str(record["error"]), "red"))
    if "arms" in record:
        parts.append(arms_table(record, plain=plain))
    elif len(record["metrics"]) > _MOST_FIGURES and record["matrix"]:
        parts.append(matrix_table(record["matrix"], plain=plain))
        parts.append(Text(f"{len(record['metrics'])} figures in the record", "dim"))
    elif record["metrics"]:
        figures = _table(plain)
        for column in ("", "", "95 % interval", "n"):
            figures.add_column(column, justify="right" if column != "" else "left")
        for key, figure in record["metrics"].items():
            metric = key.rsplit("/", 1)[-1]
            interval = interval_text(figure, metric)
            value = Text(score_text(figure["value"], metric), "bold")
            figures.add_row(key, value, Text(interval, "dim"), Text(str(figure["n"]), "dim"))
        parts.append(figures)
    elif record["status"] == "done" and record["operation"] == "train":
        kept = any(key.endswith("/validation") for key in record["data"]["fingerprints"])
        where = "; validation figures stand in metrics.jsonl of the run folder" if kept else ""
        parts.append(Text(f"no test rows, so no test figures{where}"))
    if shown := len(record["samples"]):
        what = "sample outputs stand" if shown > 1 else "sample output stands"
        parts.append(Text(f"{shown} {what} on the dashboard and in the record", "dim"))
    if cost := cost_text(record["cost"]):
        parts.append(Text(cost))
    broken = [name for name, check in record["checks"].items() if not check["passed"]]
    if broken:
        parts.append(Text(f"checks failed: {', '.join(broken)}", "bold red"))
    elif record["checks"]:
        passed = len(record["checks"])
        parts.append(Text(f"{passed} check{'s' * (passed > 1)} passed", "green"))
    if brick := record["brick"]:
        parts.append(Text(f"brick {brick['name']}@{brick['version']} in {brick['path']}"))
    return parts


def arms_table(record: Mapping[str, Any], *, plain: bool = False) -> Table:
    """The arms of a knowledge brick, what one has over another, and the cost on other text."""
    (found,) = arms([record], [record["name"]])
    table = _table(plain)
    table.add_column(f"{found['questions']} questions, {found['made']}")
    for metric in found["metrics"]:
        table.add_column(metric.replace("_", " "), justify="right")
    for row in [*found["arms"], *found["gains"]]:
        texts = []
        for metric, figure in zip(found["metrics"], row["figures"], strict=True):
            text = Text(score_text(figure["value"], metric), "bold" if figure.get("clear") else "")
            texts.append(text.append(f"  {interval_text(figure, metric)}", "dim not bold"))
        table.add_row(row["name"], *texts)
    if found["unrelated"]:
        ratio = found["unrelated"]["perplexity_ratio"]
        said = interval_text(ratio, "perplexity_ratio")
        table.caption = (
            f"unrelated text: perplexity × {score_text(ratio['value'], 'perplexity_ratio')}  {said}"
        )
        table.caption_justify = "left"
    return table


def cost_text(cost: Mapping[str, Any]) -> str:
    """The figures of a record's cost that are there, in one line."""
    parts = []
    if cost["trainable_parameters"] is not None:
        what = "parameters" if cost["train_seconds"] is None else "trained parameters"
        parts.append(f"{cost['trainable_parameters']:,} {what}")
    if cost["train_seconds"] is not None:
        parts.append(f"{cost['train_seconds']:.1f} s of training")
    parts.append(f"{cost['seconds']:.1f} s in all")
    if cost["samples_per_second"] is not None:
        parts.append(f"{cost['samples_per_second']:.0f} samples/s")
    if cost["flop_share"] is not None:
        parts.append(f"{cost['flop_share']:.0%} of the FLOP limit")
    if cost["peak_memory_bytes"] is not None:
        parts.append(f"{cost['peak_memory_bytes'] / 2**30:.1f} GiB at most")
    return ", ".join(parts)


def _cell(cell: Mapping[str, Any] | None, metric: str, *, wins: bool, plain: bool) -> Text:
    if cell is None:
        return Text("·", "dim")
    mark = "*" if wins and plain else ""
    text = Text(mark + score_text(cell["value"], metric), "bold" if wins else "")
    return text.append(f"  {interval_text(cell, metric)}", "dim not bold")


def interval_text(figure: Mapping[str, Any], metric: str) -> str:
    """A figure's ``low`` and ``high`` in the form of `score_text`."""
    joint = "–" if figure["low"] >= 0 else " to "
    return f"{score_text(figure['low'], metric)}{joint}{score_text(figure['high'], metric)}"


def _table(plain: bool) -> Table:
    return Table(
        box=None if plain else box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False
    )


def _console(file: IO[str] | None) -> Console:
    """A console as wide as the terminal, or wide enough for every column elsewhere."""
    file = file or sys.stdout
    return Console(file=file, width=None if file.isatty() else _WIDTH, highlight=False)
