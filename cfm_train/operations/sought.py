"""What finding a merge's weights needs besides its bricks, checked before torch.

Weights are chosen on validation rows and the result is judged once on test; `adamerging` alone
reads the inputs of test rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cfm_train.config.searching import Axis, axes_of, check_method, facts
from cfm_train.data.rows import Row
from cfm_train.data.sources import Checked, data_fingerprints
from cfm_train.data.splits import take
from cfm_train.data.tasks import HEADED, LOWER_IS_BETTER
from cfm_train.errors import UserError
from cfm_train.library.card import Card
from cfm_train.operations.selection import Selection, agree, find_tasks, own_sections

#: Task types whose answers are classes, with an entropy.
CLASSES = ("classification", "multilabel")


@dataclass(frozen=True)
class Sought:
    """What `check` found.

    Attributes:
        section: the section ``search``.
        axes: the numbers that are searched; none where gradients are followed.
        tasks: the tasks with all their rows.
        rows: the rows that decide, by task.
    """

    section: dict[str, Any]
    axes: list[Axis]
    tasks: dict[str, Checked]
    rows: dict[str, list[Row]]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Content hashes of the data for the config hash."""
        return data_fingerprints(self.tasks)


def check(
    config: Mapping[str, Any], selection: Selection, merge: Mapping[str, Any]
) -> Sought | None:
    """Looks whether weights can be found as a run asks for; None where they are given.

    Args:
        config: the run's config.
        selection: its bricks.
        merge: the section ``merge``.

    Raises:
        UserError: the first thing that is wrong.
    """
    search = dict(config["search"])
    if search["kind"] == "none":
        if config["tasks"] and config["heads"] == "parents":
            raise UserError(
                "tasks are what weights are found or heads are trained for: add search=grid or "
                "another search, or heads=refit, or leave tasks out (recipe=compare/bricks scores "
                "bricks)."
            )
        return None
    cards = list(selection.cards.values())
    check_method(search, merge)
    _refuse_unfollowable(search, cards)
    axes = axes_of(search, merge, selection.labels, config["weights"])
    if not config["tasks"]:
        _refuse_headless(cards)
    tasks = find_tasks(config["tasks"], cards, config["data"])
    split = "test" if facts(search["kind"]).get("chosen_on") == "test inputs" else "validation"
    for name, task in tasks.items():
        _check_task(task, search, cards)
        for needed, why in ((split, "weights are chosen on it"), ("test", "the figures are of it")):
            if not task.rows.get(needed):
                raise UserError(
                    f"The task '{name}' has no {needed} rows, and {why}: give data.{needed} or "
                    f"data.{needed}_fraction when a brick is trained on it, or leave the task out."
                )
    if search["objective"] == "metric":
        lower = [name for name, task in tasks.items() if task.spec.metric in LOWER_IS_BETTER]
        if lower and len(lower) < len(tasks):
            other = next(name for name in tasks if name not in lower)
            raise UserError(
                f"The metrics of '{lower[0]}' and '{other}' have no mean (one is better when it is "
                "lower): use search.objective=loss."
            )
    rows = {name: take(task.rows[split], search["rows"]) for name, task in tasks.items()}
    return Sought(search, axes, tasks, rows)


def _check_task(task: Checked, search: Mapping[str, Any], cards: Sequence[Card]) -> None:
    name = task.spec.name
    for card in cards:
        if name in card.heads:
            agree(card.heads[name], task.spec, card.ref)
    if task.spec.type in HEADED and not any(name in card.heads for card in cards):
        raise UserError(
            f"None of the bricks has a head for the task '{name}', so weights cannot be chosen for "
            "it: leave the task out, or add the brick that was trained on it."
        )
    if search["objective"] == "entropy" and task.spec.type not in CLASSES:
        raise UserError(
            f"search={search['kind']} goes by the entropy of classes, and the task '{name}' is of "
            f"type {task.spec.type}: leave it out, or use search=gradient."
        )


def _refuse_headless(cards: Sequence[Card]) -> None:
    """Refuses bricks that bring no task of their own where none are named."""
    for card in cards:
        if not card.heads and not own_sections([card]):
            raise UserError(
                f"{card.ref} has no head and no task of its own: name the tasks to choose weights "
                "for, tasks=[NAME, …]."
            )


def _refuse_unfollowable(search: Mapping[str, Any], cards: Sequence[Card]) -> None:
    """Refuses bricks whose weighted sum is not what they do plugged together."""
    if not facts(search["kind"]).get("follows"):
        return
    for card in cards:
        dora = (card.interface.get("hyper") or {}).get("dora")
        if card.kind not in ("lora", "stitch") or dora:
            raise UserError(
                f"search={search['kind']} follows the gradient of a sum of low-rank updates, and "
                f"{card.ref} is {'DoRA' if dora else 'of kind ' + card.kind}: use search=grid, "
                "bayes or cma_es."
            )
