"""Weights found: every point tried, the best taken, the merge of it judged on test rows once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from cfm_train.config.searching import ADAPTS
from cfm_train.evaluation.matrix import cells_of, figures_of, row
from cfm_train.evaluation.scorer import Body, Scorer
from cfm_train.merging.search.search import Search, lower
from cfm_train.operations.bench import Bench, Tried
from cfm_train.operations.trials import trials
from cfm_train.tracking.comparison_tables import cells
from cfm_train.tracking.metrics_file import MetricsFile

if TYPE_CHECKING:
    from cfm_train.tracking.wandb_run import WandbRun

METRICS, TRIALS = "metrics.jsonl", "trials.jsonl"


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        weights: the weights of the best point, as an expression has them; None for a rule without.
        section: the section ``merge`` with the best point's parameters.
        entry: ``search`` of the record.
        heatmap: the weights by brick and layer; None where they are the same in all layers.
        curves: the file with a row for each trial.
    """

    weights: Any
    section: dict[str, Any]
    entry: dict[str, Any]
    heatmap: dict[str, Any] | None
    curves: Path

    @property
    def note(self) -> str | None:
        """What is said beside its figures."""
        said: str | None = self.entry["note"]
        return said

    @property
    def choice(self) -> dict[str, Any]:
        """What the card keeps: the rows that decided, and the note."""
        return {key: self.entry[key] for key in ("chosen_on", "note")}

    def record(self) -> dict[str, Any]:
        """The search's part of the record."""
        heatmaps = {"heatmaps": [self.heatmap]} if self.heatmap else {}
        return {"search": self.entry, "curves": str(self.curves), **heatmaps}

    def line(self) -> str:
        """What a person reads of it."""
        best = self.entry["trials"][self.entry["chosen"]]
        note = f"; {self.entry['note']}" if self.entry["note"] else ""
        return (
            f"weights chosen on {self.entry['chosen_on']} by {self.entry['objective']} "
            f"{best['value']:.4f}, trial {self.entry['chosen'] + 1} of "
            f"{len(self.entry['trials'])}{note}"
        )


def find(bench: Bench, wandb: WandbRun, folder: Path, *, goes_on: bool = False) -> Found:
    """Goes through the search's proposals and takes the point of least cost.

    Args:
        bench: where points are tried.
        wandb: gets a row for each trial; it has those of ``metrics.jsonl``.
        folder: the run's; ``trials.jsonl`` and ``metrics.jsonl`` grow by a line for each trial.
        goes_on: whether trials in the folder are those of an earlier start of this very search;
            otherwise they are removed.
    """
    search, file = bench.search, MetricsFile(folder / METRICS)
    if not goes_on:
        for name in (TRIALS, METRICS):
            (folder / name).unlink(missing_ok=True)
    total = search.count(bench.problem)
    file.cut_back(total)  # a torn line goes
    logged = len(file.rows())
    tried: list[Tried] = []
    with tqdm(total=total, desc=f"search {search.kind}", unit="trial") as bar:
        for one in trials(bench, folder / TRIALS):
            if math.isfinite(one.cost):
                tried.append(one)
                if len(tried) > logged:
                    file.append(len(tried), _row(search, one))
                    wandb.log(len(tried), _row(search, one))
            bar.update()
            if tried:
                bar.set_postfix_str(f"best {search.compared} {tried[_best(tried)].value:.4f}")
    rows = [_row(search, one) for one in tried]
    if file.rows() != [{"step": step, **row} for step, row in enumerate(rows, start=1)]:
        file.cut_back(0)  # an earlier start came to other trials
        for step, row in enumerate(rows, start=1):
            file.append(step, row)
    chosen = _best(tried)
    best = tried[chosen].point
    names = [axis.name for axis in bench.axes]
    entry = {
        "method": search.kind,
        "objective": search.compared,
        "chosen_on": search.chosen_on,
        "note": ADAPTS if search.chosen_on == "test inputs" else None,
        "lower_is_better": all(bench.lower_is_better(task) for task in bench.rows),
        "rows": {task: len(rows) for task, rows in bench.rows.items()},
        "axes": names,
        "trials": [
            {
                "point": dict(zip(names, one.point, strict=True)),
                "value": one.value,
                "scores": one.scores,
                "penalty": search.penalty(one.point),
            }
            for one in tried
        ],
        "chosen": chosen,
    }
    wandb.table(
        "search",
        [*names, search.compared],
        [[*one.point, one.value] for one in tried],
    )
    weights = bench.weights(best)
    return Found(weights, dict(bench.mixed(best)), entry, _heatmap(bench, weights), file.path)


def _heatmap(bench: Bench, weights: Any) -> dict[str, Any] | None:
    if weights is None or not all(isinstance(one, list) for one in weights):
        return None
    return {
        "title": "weights by brick and layer",
        "rows": list(bench.labels),
        "columns": [f"layer {layer}" for layer in range(len(weights[0]))],
        "values": weights,
        "chosen": None,
    }


def _best(tried: Sequence[Tried]) -> int:
    return lower([one.cost for one in tried])


def _row(search: Search, one: Tried) -> dict[str, float]:
    each = one.scores.items() if len(one.scores) > 1 else ()
    return {f"search/{search.objective}": one.value} | {
        f"search/{task}/{search.objective}": score for task, score in each
    }


@dataclass(frozen=True)
class Reported:
    """Figures of the merge on test rows.

    Attributes:
        metrics: every figure, ``test/<task>/<metric>``.
        matrix: a cell for each task.
        examples: where what each row added is kept; None where nothing was evaluated.
    """

    metrics: dict[str, Any]
    matrix: list[dict[str, Any]]
    examples: dict[str, Any] | None

    def record(self) -> dict[str, Any]:
        """The figures' part of the record."""
        examples = {"examples": self.examples} if self.examples else {}
        return {"metrics": self.metrics, "matrix": self.matrix, **examples}


def report(body: Body, scorer: Scorer, wandb: WandbRun, folder: Path) -> Reported:
    """Judges the merge on the test rows of each task, with the heads that it carries.

    Args:
        body: the merge.
        scorer: has the tasks; one without test rows is left out.
        wandb: gets the matrix and the figures.
        folder: the run's, for the examples.
    """
    tasks = [name for name, task in scorer.tasks.items() if task.test is not None]
    scored = row(scorer, body, tasks, {})
    matrix, metrics = cells_of(scored), figures_of(scored)
    wandb.table("matrix", *cells(matrix))
    wandb.summary({name: figure["value"] for name, figure in metrics.items()})
    return Reported(metrics, matrix, scorer.shelf.write(folder))
