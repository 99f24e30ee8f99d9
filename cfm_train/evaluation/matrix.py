"""The brick × task matrix: every body with the head of each task's own brick.

A cell (brick, task) is that brick plugged in, with the head that the task's own brick was trained
with: it shows what the body does to the task. A body that brings a head for the task itself (as the
task's own brick, a brick merged from it, or one trained on several tasks) answers with that. Where
no brick brings one, a head is refitted on the body, and the cell's metric says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.heads import Head
from cfm_train.data.encode import TaskData
from cfm_train.data.tasks import HEADED
from cfm_train.errors import UserError
from cfm_train.evaluation.floor import train_head
from cfm_train.evaluation.judge import judge_task, primary, scores_of

REFITTED = "head refitted"


def heads_of(bodies: Sequence[Brick]) -> dict[str, Head]:
    """A head for each task: that of its own brick, before one of a brick for several tasks."""
    heads: dict[str, Head] = {}
    for brick in sorted(bodies, key=lambda body: len(body.heads)):
        for name, head in brick.heads.items():
            heads.setdefault(name, head)
    return heads


def row(
    backbone: Backbone,
    label: str,
    role: str,
    plugged: Sequence[Brick],
    tasks: Mapping[str, TaskData],
    heads: Mapping[str, Head],
    trainer: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    *,
    seed: int,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float | int]]]:
    """One row of the matrix.

    Args:
        backbone: the backbone, nothing plugged.
        label: name of the row.
        role: ``brick``, ``merged``, ``floor`` or ``ceiling``.
        plugged: the bricks that make up the body; none is the bare backbone.
        tasks: the columns; each needs a test split.
        heads: head by task name for what the body brings none for, see `heads_of`; a task that
            needs one and has none gets one refitted.
        trainer: the ``trainer`` section for refitting.
        evaluation: the ``evaluation`` section.
        seed: seed of refitting and bootstrap.

    Returns:
        The cells, and every metric as ``test/<task>/<metric>``.

    Raises:
        UserError: a task has no test split.
    """
    cells: list[dict[str, Any]] = []
    figures: dict[str, dict[str, float | int]] = {}
    for name, task in tasks.items():
        if task.test is None:
            raise UserError(
                f"The task '{name}' has no test split: give data.test, or leave it out."
            )
        own = [head for brick in plugged if (head := brick.head_for(name)) is not None]
        with backbone.slots.plugged(list(plugged)):
            head = own[0] if own else heads.get(name)
            refitted = head is None and task.spec.type in HEADED
            if refitted:
                head = train_head(backbone, task, trainer, seed=seed)
            scores = scores_of(judge_task(backbone, head, task.spec, task.test), evaluation, seed)
        metric = primary(task.spec, scores)
        shown = f"{metric} ({REFITTED})" if refitted else metric
        cells.append(
            {
                "brick": label,
                "task": name,
                "metric": shown,
                **scores[metric].as_dict(),
                "role": role,
            }
        )
        figures |= {f"test/{name}/{m}": value.as_dict() for m, value in scores.items()}
    return cells, figures
