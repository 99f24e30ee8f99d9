"""Which rows and tasks of a comparison count: choices on validation, rivals, seeds, averages.

Everything is made of evaluations by one scorer, so that each is asked once and none that an earlier
record holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.configuration.expression import bricks
from cfm_train.configuration.variants import (
    seed_families,
    tuned_families,
    without_versions,
)
from cfm_train.data.tasks import LOWER_IS_BETTER
from cfm_train.evaluation.matrix import row
from cfm_train.evaluation.ranking import Ranking
from cfm_train.evaluation.scorer import Body, Scored

if TYPE_CHECKING:
    from cfm_train.operations.compare import Inputs
    from cfm_train.operations.scene import Scene

Json = dict[str, Any]

#: The roles of rows that can win.
RIVALS = ("brick", "merged")


class Compared:
    """Rows that have been scored, and what follows from them.

    Args:
        scene: backbone, bodies and scorer.
        inputs: what the run's ``check`` found.
        rows: each row's scores on every task, in the order of the tasks; bodies and the floor.
        made_by: records of the runs that made the bricks.
    """

    def __init__(
        self,
        scene: Scene,
        inputs: Inputs,
        rows: Mapping[str, Sequence[Scored]],
        made_by: Sequence[Path],
    ) -> None:
        self.scene, self.inputs, self.rows = scene, inputs, rows
        self.scorer, self.tasks = scene.scorer, list(inputs.tasks)
        self.bodies: dict[str, Body] = {body.label: body for body in scene.bodies}
        self.records = {path.parent.name: json.loads(path.read_text("utf-8")) for path in made_by}
        self.bootstrap = max(1, self.scorer.evaluation["bootstrap"])

    def own(self, label: str) -> list[str]:
        """The tasks of the comparison that a row's bricks were trained on."""
        refs = [str(ref) for ref in bricks(self.inputs.trees[label])]
        found = {task for ref in refs for task in self.inputs.owners.get(ref, ())}
        return [task for task in self.tasks if task in found]

    @cached_property
    def unrelated(self) -> list[str]:
        """Tasks that no brick here was trained on."""
        return [task for task in self.tasks if all(task not in self.own(x) for x in self.bodies)]

    @cached_property
    def ranked_tasks(self) -> list[str]:
        """The tasks that averages are over: those of the bricks, or all where they have none."""
        return [task for task in self.tasks if task not in self.unrelated] or self.tasks

    @cached_property
    def individuals(self) -> dict[str, str]:
        """Each task's own brick: the first that was trained on it alone."""
        found: dict[str, str] = {}
        for label, body in self.bodies.items():
            owned = self.own(label)
            if body.role == "brick" and len(owned) == 1:
                found.setdefault(owned[0], label)
        return {task: found[task] for task in self.ranked_tasks if task in found}

    @cached_property
    def families(self) -> list[list[str]]:
        """Rows that differ in what is tuned alone."""
        return tuned_families(self.inputs.trees)

    @cached_property
    def validation(self) -> dict[str, float]:
        """What each row of a family is chosen by: its mean over validation splits.

        Losses and errors count as negative numbers, so that higher is better. A family without
        validation rows is not there.
        """
        found: dict[str, float] = {}
        for family in self.families:
            tasks = [
                task for task in self.own(family[0]) or self.ranked_tasks
                if self.scorer.tasks[task].validation is not None
            ]  # fmt: skip
            if not tasks:
                continue
            scores = {
                label: row(
                    self.scorer, self.bodies[label], tasks, self.scene.heads, split="validation"
                )
                for label in family
            }
            columns = zip(*scores.values(), strict=True)
            merits = zip(*(_merits(list(column)) for column in columns), strict=True)
            found |= {
                label: sum(each) / len(each)
                for label, each in zip(family, map(list, merits), strict=True)
            }
        return found

    @cached_property
    def chosen(self) -> list[str]:
        """The row of each family that is best on validation."""
        judged = [family for family in self.families if family[0] in self.validation]
        return [max(family, key=lambda label: self.validation[label]) for family in judged]

    def competes(self, label: str) -> bool:
        """Whether a row may win: no bound, and no point of a curve that was not chosen."""
        passed_over = label in self.validation and label not in self.chosen
        return label in self.bodies and self.bodies[label].role in RIVALS and not passed_over

    def shown(self) -> list[Body]:
        """The bodies that are looked at closely: all but points of curves that were not chosen."""
        return [
            body for label, body in self.bodies.items()
            if label not in self.validation or label in self.chosen
        ]  # fmt: skip

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """Rows that differ by the seed alone, by what they have in common."""
        rivals = {x: tree for x, tree in self.inputs.trees.items() if self.competes(x)}
        found = {}
        for members in seed_families(rivals, self.library, self.chosen):
            names = {without_versions(label) for label in members}
            found[names.pop() if len(names) == 1 else f"{members[0]} and others"] = members
        return found

    @property
    def library(self) -> Any:
        """The library that the bricks lie in."""
        return self.inputs.selection.library

    @cached_property
    def ranking(self) -> Ranking:
        """All rows on the tasks that count, resampled together."""
        return self.ranked(self.rows, self.ranked_tasks, self.individuals)

    def ranked(
        self,
        rows: Mapping[str, Sequence[Scored]],
        tasks: Sequence[str],
        individuals: Mapping[str, str] | None = None,
    ) -> Ranking:
        """Rows on some tasks, resampled together; ``individuals`` are what they are measured by."""
        at = {task: number for number, task in enumerate(self.tasks)}
        first = next(iter(rows.values()))
        return Ranking(
            {
                label: {task: scored[at[task]].examples for task in tasks}
                for label, scored in rows.items()
            },
            {task: first[at[task]].metric for task in tasks},
            individuals or {},
            {task: self.inputs.tasks[task].fingerprints["test"] for task in tasks},
            bootstrap=self.bootstrap,
            seed=self.scorer.seed,
        )


def _merits(column: Sequence[Scored]) -> list[float]:
    """Scores of one task as numbers that are better when higher and can be averaged."""
    metric = column[0].metric
    values = [one.scores[metric].value for one in column]
    return [-value for value in values] if metric in LOWER_IS_BETTER else values
