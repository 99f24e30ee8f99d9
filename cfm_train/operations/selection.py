"""What operations on finished bricks share: which bricks, which backbone, which tasks; all before
torch.

Bricks are named by reference (``sst2``, ``sst2@1f2c``) or by a configuration (``merge(linear, [a,
b])``). The backbone is the one they were made for; a task is a data YAML by name, or the data of a
brick's own training run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cfm_train.backbone.fingerprint import fingerprint
from cfm_train.backbone.spec import ResolvedBackbone, resolve
from cfm_train.config.catalogue import groups
from cfm_train.config.compose import option
from cfm_train.configuration.expression import BrickRef, Expression, bricks
from cfm_train.configuration.opened import opened_from
from cfm_train.configuration.parser import parse
from cfm_train.configuration.pin import pin
from cfm_train.data.sources import Checked, check_all, task_sections
from cfm_train.data.tasks import TaskSpec
from cfm_train.errors import UserError, nearest
from cfm_train.library import gate
from cfm_train.library.card import Card
from cfm_train.library.store import Library
from cfm_train.stitching.cards import check_tree


@dataclass(frozen=True)
class Selection:
    """The bricks of a run.

    Attributes:
        library: where they lie.
        trees: the configurations, versions pinned, in the order given.
        labels: how a person wrote each.
        cards: the card of every brick in them, by reference.
        section: the ``backbone`` section they were made with.
        backbone: the backbone's folder.
        fingerprints: content hashes for the config hash.
    """

    library: Library
    trees: list[Expression]
    labels: list[str]
    cards: dict[str, Card]
    section: dict[str, Any]
    backbone: ResolvedBackbone
    fingerprints: dict[str, str]

    def card_of(self, tree: Expression) -> Card | None:
        """The card of a tree that is a single brick."""
        return self.cards[str(tree)] if isinstance(tree, BrickRef) else None


def select(config: Mapping[str, Any]) -> Selection:
    """Finds the bricks that ``bricks`` names and the backbone they need.

    Raises:
        UserError: a brick is missing, or they need different backbones, or none can be found; or a
            stitch in a configuration cannot be.
    """
    if not config["bricks"]:
        raise UserError("bricks is empty: name at least one, as in bricks=[sst2].")
    library = Library(config["library"])
    trees = [pin(parse(text), library) for text in config["bricks"]]
    cards = {str(ref): library.find(str(ref)) for tree in trees for ref in bricks(tree)}
    for card in cards.values():
        gate.require_brick(card)
    read = [inner for card in cards.values() for inner in opened_from(card, library)]
    section = dict(config.get("backbone") or _section(cards))
    backbone = resolve(section)
    found = fingerprint(backbone.folder)
    for card in read:
        gate.require_backbone(card, found, backbone.id)
    for tree in trees:
        check_tree(tree, library)
    labels = [str(parse(text)) for text in config["bricks"]]
    twice = {label for label in labels if labels.count(label) > 1}
    if twice:
        raise UserError(f"bricks names '{min(twice)}' twice: name each once.")
    fingerprints = {"backbone": found} | {
        f"brick/{ref}": card.version for ref, card in cards.items()
    }
    return Selection(library, trees, labels, cards, section, backbone, fingerprints)


def _section(cards: Mapping[str, Card]) -> dict[str, Any]:
    for card in cards.values():
        section = card.recipe.get("backbone")
        if isinstance(section, Mapping):
            return dict(section)
    card = next(iter(cards.values()))
    raise UserError(
        f"The library does not say where the backbone '{card.backbone_id}' of {card.ref} lies: add "
        "backbone=minilm, or backbone=hf backbone.path=FOLDER_OR_HUB_ID."
    )


def find_tasks(
    names: Sequence[str], cards: Sequence[Card], data: Mapping[str, Any]
) -> dict[str, Checked]:
    """The tasks that ``tasks`` names, with all their rows; without names the bricks' own.

    Args:
        names: data YAMLs, or names of data that a brick was trained on.
        cards: the bricks, for the data sections of their runs.
        data: ``root`` and ``limit`` for data YAMLs.

    Raises:
        UserError: there is no such task, or its rows cannot be read.
    """
    own = own_sections(cards)
    known = groups().get("data", {})
    overrides = {key: data[key] for key in ("root", "limit") if data.get(key) is not None}
    tasks: dict[str, Checked] = {}
    for name in names or list(own):
        if name in own:
            # A data YAML's root may have moved since the brick was trained.
            moved = {k: v for k, v in overrides.items() if k == "limit" or own[name].get("root")}
            section = {**own[name], **moved}
        elif name in known:
            section = option("data", name, **overrides)
        else:
            raise UserError(f"There is no task '{name}'.{nearest(name, [*known, *own])}")
        for task in check_all(section):
            tasks[task.spec.name] = task
    if not tasks:
        raise UserError("tasks is empty, and the bricks name none: give tasks=[NAME, …].")
    return tasks


def own_sections(cards: Sequence[Card]) -> dict[str, dict[str, Any]]:
    """The data sections of the runs that made the bricks, by task name; parents' heads included."""
    sections: dict[str, dict[str, Any]] = {}
    recipes = [card.recipe for card in cards]
    for recipe in recipes:  # grows while it is read: a merge of merges has grandparents
        recipes += recipe.get("parents", {}).values()
        section = recipe.get("data")
        if isinstance(section, Mapping) and "task" in section and section.get("name"):
            for each in task_sections(section):
                sections.setdefault(str(each["name"]), each)
    return sections


def agree(described: Mapping[str, Any], spec: TaskSpec, brick: str) -> None:
    """Refuses a head whose outputs mean something else than the task's labels.

    Args:
        described: the head as its card describes it.
        spec: the task.
        brick: whose head it is, for the error sentence.
    """
    labels = None if spec.labels is None else list(spec.labels)
    if described["task"] != spec.type or described["labels"] != labels:
        raise UserError(
            f"The head '{spec.name}' of {brick} answers "
            f"{_shown(described['task'], described['labels'])}, but the task's data hold "
            f"{_shown(spec.type, labels)}: list data.labels in the head's order, or evaluate under "
            "another name."
        )


def _shown(task_type: str, labels: list[str] | None) -> str:
    if labels is None:
        return task_type
    more = ", …" if len(labels) > 6 else ""
    return f"{task_type} into {', '.join(labels[:6])}{more}"
