"""Heads trained anew on a merge (``heads=refit``).

What a merge loses it loses for the most part at the heads: they were trained on what their own
bricks make of a text, and the merge makes something else of it. The merge stays as it is; for each
task a head is trained on its features, from the rows that the task's brick was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from cfm_train.data.sources import Checked
from cfm_train.data.tasks import HEADED
from cfm_train.errors import UserError
from cfm_train.operations.selection import Selection, find_tasks

if TYPE_CHECKING:
    from cfm_train.bricks.brick import Brick
    from cfm_train.evaluation.scorer import Body, Scorer


def check(
    config: Mapping[str, Any], selection: Selection, sought: Mapping[str, Checked] | None
) -> dict[str, Checked]:
    """The tasks that get new heads; none where the parents' heads are kept.

    Args:
        config: the run's config: ``heads``, ``tasks`` (the bricks' own, unless named), ``data``.
        selection: its bricks.
        sought: the same tasks where they have been read for a search; None to read them here.

    Raises:
        UserError: there is no task with a head, or one has no training rows.
    """
    if config["heads"] == "parents":
        return {}
    found = sought
    if found is None:
        found = find_tasks(config["tasks"], list(selection.cards.values()), config["data"])
    tasks = {name: task for name, task in found.items() if task.spec.type in HEADED}
    if not tasks:
        raise UserError(
            "heads=refit trains heads anew, and none of the tasks has one: "
            f"{', '.join(f'{name} is of type {task.spec.type}' for name, task in found.items())}."
        )
    for name, task in tasks.items():
        if not task.rows.get("train"):
            raise UserError(
                f"The task '{name}' has no training rows, and heads=refit trains a head on them: "
                "give data.root, or leave the task out (tasks=[…])."
            )
    return tasks


def refit(body: Body, brick: Brick, tasks: Sequence[str], scorer: Scorer) -> None:
    """Gives a merge a new head for each task; heads for other tasks stay.

    Args:
        body: the merge.
        brick: its brick; the heads are put into it.
        tasks: names of the scorer's tasks.
        scorer: has the rows, and what heads are trained with.
    """
    with tqdm(tasks, desc="heads", unit="task", leave=False) as bar:
        for task in bar:
            bar.set_postfix_str(task)
            brick.add_head(task, scorer.trained(body, task))
