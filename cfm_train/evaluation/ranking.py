"""Which combination wins: normalised averages, the winner, and its margin to the runner-up.

    normalised score of a row on a task   m(row) / m(the task's individual brick)
    normalised average                    its mean over tasks (as in arXiv 2212.04089)

All intervals here are 95 % percentile intervals of a paired bootstrap: within a task every row is
resampled with the same examples, so that a ratio or a difference carries the individual brick's own
uncertainty as well and loses what is hard for everyone; tasks are resampled apart from each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cfm_train.data.tasks import LOWER_IS_BETTER
from cfm_train.evaluation.examples import Examples, Together, interval, together

Json = dict[str, Any]

#: What the page and the record say of these intervals.
METHOD = "paired percentile bootstrap over test examples"


class Ranking:
    """Rows on the same tasks, resampled together.

    Args:
        rows: examples of each row by task; every row has all tasks.
        metrics: the metric of each task.
        individuals: the row that is each task's own brick, where there is one.
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
        *,
        bootstrap: int,
        seed: int,
    ) -> None:
        self.labels, self.metrics, self.individuals = list(rows), dict(metrics), dict(individuals)
        self.tasks: dict[str, Together] = {
            task: together(
                [rows[label][task] for label in self.labels],
                metric,
                bootstrap=bootstrap,
                seed=[seed, number],
            )
            for number, (task, metric) in enumerate(metrics.items())
        }

    def normalised(self) -> list[Json]:
        """Each row's normalised average, and its part of each task.

        Returns:
            ``label``, ``value``, ``low``, ``high``, ``n``, ``tasks`` (task -> figure) for each row.
            Nothing where a task lacks an individual brick, or that brick's score is not positive (a
            correlation may be), so that there is nothing to divide by.
        """
        ratios = self._ratios()
        if ratios is None:
            return []
        found = []
        total = sum(each.n for each in self.tasks.values())
        for at, label in enumerate(self.labels):
            parts = {
                task: interval(values[at], draws[at], self.tasks[task].n).as_dict()
                for task, (values, draws) in ratios.items()
            }
            value = float(np.mean([values[at] for values, _ in ratios.values()]))
            draws = np.mean([draws[at] for _, draws in ratios.values()], axis=0)
            found.append(
                {"label": label, **interval(value, draws, total).as_dict(), "tasks": parts}
            )
        return found

    def winner(self, rivals: Sequence[str]) -> Json | None:
        """The best of some rows over all tasks, and how sure that is.

        Rows are ranked by the mean of the tasks' metrics; where some of these are better when lower
        and some when higher, by the normalised average.

        Args:
            rivals: labels of the rows that may win.

        Returns:
            ``label``, ``runner_up``, ``by`` (``mean`` or ``normalised``), ``lower_is_better``,
            ``figure`` (the winner's), ``margin`` (by how much it is better, with its paired
            interval), ``clear`` (whether that leaves out 0), ``tasks`` (the margin on each task),
            ``method``. None where fewer than two rows stand against each other, or nothing can be
            averaged.
        """
        scale = self._scale()
        if len(rivals) < 2 or scale is None:
            return None
        by, sign, measured = scale
        places = {label: self.labels.index(label) for label in rivals}
        means = np.mean([values for values, _ in measured.values()], axis=0)
        first, second = sorted(rivals, key=lambda label: -sign * means[places[label]])[:2]
        a, b = places[first], places[second]
        draws = np.mean([each for _, each in measured.values()], axis=0)
        total = sum(each.n for each in self.tasks.values())
        margin = interval(float(sign * (means[a] - means[b])), sign * (draws[a] - draws[b]), total)
        each_task = {}
        for task, (values, resampled) in measured.items():
            better = float(sign * (values[a] - values[b])), sign * (resampled[a] - resampled[b])
            each_task[task] = interval(*better, self.tasks[task].n).as_dict()
        return {
            "label": first,
            "runner_up": second,
            "by": by,
            "lower_is_better": sign < 0,
            "figure": interval(float(means[a]), draws[a], total).as_dict(),
            "margin": margin.as_dict(),
            "clear": margin.low > 0,
            "tasks": each_task,
            "method": METHOD,
        }

    def _scale(self) -> tuple[str, int, dict[str, tuple[np.ndarray, np.ndarray]]] | None:
        """What rows are ranked by: its name, its sign, and values and draws of each task."""
        directions = {metric in LOWER_IS_BETTER for metric in self.metrics.values()}
        if len(directions) == 1:
            plain = {task: (each.values, each.draws) for task, each in self.tasks.items()}
            return "mean", -1 if directions.pop() else 1, plain
        ratios = self._ratios()
        return None if ratios is None else ("normalised", 1, ratios)

    def _ratios(self) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
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
