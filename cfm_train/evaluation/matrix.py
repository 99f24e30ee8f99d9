"""The brick × task matrix: every body with the head of each task's own brick.

A cell (brick, task) is that brick plugged in, with the head that the task's own brick was trained
with: it shows what the body does to the task. A body that brings a head for the task itself (as the
task's own brick, a brick merged from it, or one trained on several tasks) answers with that. Where
no brick brings one, a head is refitted on the body, and the cell's metric says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cfm_train.bricks.heads import Head
from cfm_train.data.tasks import HEADED
from cfm_train.evaluation.scorer import BARE, Body, Scored, Scorer, TrainedOn

#: Whose head it is where one was trained anew on the body.
REFITTED = "head refitted"

#: A task's head and the label of the body that brings it.
Bring = tuple[Head, str]


def heads_of(bodies: Sequence[Body]) -> dict[str, Bring]:
    """A head for each task: that of its own brick, before one of a brick for several tasks."""
    heads: dict[str, Bring] = {}
    bricks = [(body.label, body.brick) for body in bodies if body.brick is not None]
    for label, brick in sorted(bricks, key=lambda pair: len(pair[1].heads)):
        for name, head in brick.heads.items():
            heads.setdefault(name, (head, label))
    return heads


def row(
    scorer: Scorer,
    body: Body,
    tasks: Sequence[str],
    heads: Mapping[str, Bring],
    split: str = "test",
) -> list[Scored]:
    """One row of the matrix.

    Args:
        scorer: what evaluates.
        body: the body.
        tasks: the columns.
        heads: for tasks that the body brings no head for, see `heads_of`; a task that needs one and
            has none gets one refitted.
        split: ``test`` or ``validation``.

    Raises:
        UserError: a task has no such split.
    """
    scored = []
    for task in tasks:
        own = None if body.brick is None else body.brick.head_for(task)
        head: Head | TrainedOn | None = None
        of: str | None
        if own is not None:
            head, of = own, body.label
        elif task in heads:
            head, of = heads[task]
        else:
            refit = scorer.tasks[task].spec.type in HEADED
            head, of = (TrainedOn(body), REFITTED) if refit else (None, None)
        scored.append(scorer.score(body, task, head, of=of, split=split))
    return scored


def refitted(scorer: Scorer, body: Body, tasks: Sequence[str]) -> list[Scored]:
    """One row with a head that is trained anew on the body: what its features hold of each task."""
    return [
        scorer.score(body, task, TrainedOn(body), of=REFITTED)
        for task in tasks
        if scorer.tasks[task].spec.type in HEADED
    ]


def floor(scorer: Scorer, tasks: Sequence[str]) -> list[Scored]:
    """The lower bound: the bare backbone with heads trained alone, language models as they are."""
    headed = [scorer.tasks[task].spec.type in HEADED for task in tasks]
    return [
        scorer.score(BARE, task, TrainedOn(BARE) if has else None, of=BARE.label if has else None)
        for task, has in zip(tasks, headed, strict=True)
    ]


def cells_of(scored: Sequence[Scored], *, mark: bool = True) -> list[dict[str, Any]]:
    """The cells; with ``mark``, one with a refitted head among others' says so in its metric."""
    return [
        {**one.cell(), "metric": f"{one.metric} ({REFITTED})"}
        if mark and one.head == REFITTED
        else one.cell()
        for one in scored
    ]


def figures_of(scored: Sequence[Scored]) -> dict[str, dict[str, float | int]]:
    """Every metric of a row as ``test/<task>/<metric>``."""
    return {
        f"test/{one.spec.name}/{metric}": value.as_dict()
        for one in scored
        for metric, value in one.scores.items()
    }
