"""Which combination wins: averages over tasks, the winner, and its margin to the runner-up.

    normalised score of a row on a task   m(row) / m(the task's individual brick)
    normalised average                    its mean over tasks (as in arXiv 2212.04089)

All intervals here are 95 % percentile intervals of a paired bootstrap: within a test set every row
is resampled with the same examples, so that a ratio or a difference carries the individual brick's
own uncertainty as well and loses what is hard for everyone; test sets are resampled apart from
each other. Tasks that share their test rows (one test set with the heads of several bricks) are
resampled together and count as one in every average, or one test set would count several times.

Rows that differ by the seed alone rank as their mean; between two such means the margin is taken
seed by seed, with Student's interval (`seeds`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cfm_train.data.tasks import LOWER_IS_BETTER
from cfm_train.evaluation.examples import Examples, Together, interval, together
from cfm_train.evaluation.seeds import over_seeds

Json = dict[str, Any]
#: Values [rows] and draws [rows, resamples] of one task.
Measured = tuple[np.ndarray, np.ndarray]

#: What the page and the record say of these intervals.
METHOD = "paired percentile bootstrap over test examples"
OVER_SEEDS = "paired by seed, Student's interval over seeds"


class Ranking:
    """Rows on the same tasks, resampled together.

    Args:
        rows: examples of each row by task; every row has all tasks.
        metrics: the metric of each task.
        individuals: the row that is each task's own brick, where there is one.
        test_sets: what tells a task's test rows apart (their fingerprint); none: all differ.
        bootstrap: number of resamples.
        seed: seed of the draws.

    Raises:
        UserError: two rows answered different examples of a task.
    """

    def __init__(
        self,
        rows: Mapping[str, Mapping[str, Examples]],
        metrics: Mapping[str, str],
        individuals: Mapping[str, str],
        test_sets: Mapping[str, str] | None = None,
        *,
        bootstrap: int,
        seed: int,
    ) -> None:
        self.labels, self.metrics, self.individuals = list(rows), dict(metrics), dict(individuals)
        groups: dict[str, list[str]] = {}
        for task in metrics:
            groups.setdefault((test_sets or {}).get(task, task), []).append(task)
        self.groups = list(groups.values())
        self.tasks: dict[str, Together] = {}
        for number, tasks in enumerate(self.groups):
            pairs = [(task, label) for task in tasks for label in self.labels]
            found = together(
                [rows[label][task] for task, label in pairs],
                [metrics[task] for task, _ in pairs],
                bootstrap=bootstrap,
                seed=[seed, number],
            )
            for at, task in enumerate(tasks):
                part = slice(at * len(self.labels), (at + 1) * len(self.labels))
                self.tasks[task] = Together(found.values[part], found.draws[part], found.n)

    @property
    def examples(self) -> int:
        """How many test examples there are; shared ones once."""
        return sum(self.tasks[tasks[0]].n for tasks in self.groups)

    def means(self) -> dict[str, Json]:
        """Each row's mean over tasks; nothing where some are better low and some high."""
        if len({metric in LOWER_IS_BETTER for metric in self.metrics.values()}) > 1:
            return {}
        return self._figures({t: (each.values, each.draws) for t, each in self.tasks.items()})

    def normalised(self) -> dict[str, Json]:
        """Each row's normalised average.

        Returns:
            The figure of each row. Nothing where a task lacks an individual brick, or that brick's
            score is not positive (a correlation may be), so that there is nothing to divide by.
        """
        ratios = self._ratios()
        return {} if ratios is None else self._figures(ratios)

    def winner(self, rivals: Mapping[str, Sequence[str]]) -> Json | None:
        """The best of some rows over all tasks, and how sure that is.

        Rows are ranked by the mean of the tasks' metrics; where some of these are better when lower
        and some when higher, by the normalised average.

        Args:
            rivals: what may win: a name, and the rows that it is the mean of (one, or its seeds).

        Returns:
            ``label``, ``runner_up``, ``by`` (``mean`` or ``normalised``), ``lower_is_better``,
            ``figure`` (the winner's), ``margin`` (by how much it is better, with its paired
            interval), ``clear`` (whether that leaves out 0), ``tasks`` (the margin on each task),
            ``method``. None where fewer than two stand against each other, or nothing can be
            averaged.
        """
        scale = self._scale()
        if len(rivals) < 2 or scale is None:
            return None
        by, sign, measured = scale
        values, draws = self._average(measured)
        places = {
            name: [self.labels.index(label) for label in rows] for name, rows in rivals.items()
        }
        ranked = sorted(rivals, key=lambda name: -sign * float(values[places[name]].mean()))
        first, second = ranked[:2]
        a, b = places[first], places[second]
        by_seed = len(a) == len(b) > 1

        def margin(values: np.ndarray, draws: np.ndarray, n: int) -> Json:
            if by_seed:
                return over_seeds((sign * (values[a] - values[b])).tolist())
            apart = draws[a].mean(0) - draws[b].mean(0)
            return interval(
                float(sign * (values[a].mean() - values[b].mean())), sign * apart, n
            ).as_dict()

        whole = margin(values, draws, self.examples)
        return {
            "label": first,
            "runner_up": second,
            "by": by,
            "lower_is_better": sign < 0,
            "figure": self._figure(values, draws, a),
            "margin": whole,
            "clear": whole["low"] > 0,
            "tasks": {task: margin(*measured[task], self.tasks[task].n) for task in measured},
            "method": OVER_SEEDS if by_seed else METHOD,
        }

    def figure_of(self, rows: Sequence[str], *, normalised: bool) -> Json | None:
        """The mean over tasks of one row, or of several seeds with Student's interval."""
        found = self.normalised() if normalised else self.means()
        if not found:
            return None
        if len(rows) == 1:
            return found[rows[0]]
        return over_seeds([found[label]["value"] for label in rows])

    def _figure(self, values: np.ndarray, draws: np.ndarray, rows: Sequence[int]) -> Json:
        if len(rows) > 1:
            return over_seeds(values[list(rows)].tolist())
        return interval(float(values[rows[0]]), draws[rows[0]], self.examples).as_dict()

    def _figures(self, measured: Mapping[str, Measured]) -> dict[str, Json]:
        values, draws = self._average(measured)
        return {label: self._figure(values, draws, [at]) for at, label in enumerate(self.labels)}

    def _average(self, measured: Mapping[str, Measured]) -> Measured:
        """The mean over test sets; of tasks that share one, their mean first."""
        values = [np.mean([measured[t][0] for t in tasks], axis=0) for tasks in self.groups]
        draws = [np.mean([measured[t][1] for t in tasks], axis=0) for tasks in self.groups]
        return np.mean(values, axis=0), np.mean(draws, axis=0)

    def _scale(self) -> tuple[str, int, dict[str, Measured]] | None:
        """What rows are ranked by: its name, its sign, and values and draws of each task."""
        directions = {metric in LOWER_IS_BETTER for metric in self.metrics.values()}
        if len(directions) == 1:
            plain = {task: (each.values, each.draws) for task, each in self.tasks.items()}
            return "mean", -1 if directions.pop() else 1, plain
        ratios = self._ratios()
        return None if ratios is None else ("normalised", 1, ratios)

    def _ratios(self) -> dict[str, Measured] | None:
        """Each row's score as a share of the individual brick's, on all examples and resampled."""
        ratios = {}
        for task, metric in self.metrics.items():
            if task not in self.individuals:
                return None
            each, own = self.tasks[task], self.labels.index(self.individuals[task])
            lower = metric in LOWER_IS_BETTER
            below = each.values.min() if lower else each.values[own]
            below_draws = each.draws.min() if lower else each.draws[own].min()
            if below <= 0 or below_draws <= 0:
                return None
            if lower:
                ratios[task] = (each.values[own] / each.values, each.draws[own] / each.draws)
            else:
                ratios[task] = (each.values / each.values[own], each.draws / each.draws[own])
        return ratios
