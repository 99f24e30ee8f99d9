"""What evaluations of finished bricks stand on: the backbone, the bodies, their heads, a scorer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.configuration.apply import assemble
from cfm_train.configuration.expression import Expression, bricks
from cfm_train.evaluation.matrix import Bring, heads_of
from cfm_train.evaluation.scorer import Body, Scorer, identity_of
from cfm_train.evaluation.shelf import Shelf
from cfm_train.library.choice import note
from cfm_train.operations.evaluate import Inputs, role_of
from cfm_train.operations.selection import Selection
from cfm_train.operations.setting import (
    backbone_entries,
    brick_entry,
    open_backbone,
    scorer_for,
    unchanged,
)
from cfm_train.training.cost import peak_memory

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


@dataclass(frozen=True)
class Scene:
    """A loaded backbone and everything that is scored on it.

    Attributes:
        backbone: nothing plugged.
        checksum: of the backbone's tensors when it had just been loaded.
        bodies: the bricks and configurations in the order given.
        heads: a head for each task, see `heads_of`.
        scorer: what evaluates.
        seconds: what assembling each body took, by label.
    """

    backbone: Backbone
    checksum: str
    bodies: list[Body]
    heads: dict[str, Bring]
    scorer: Scorer
    seconds: dict[str, float]

    def body(self, label: str, tree: Expression, selection: Selection) -> Body:
        """A configuration, assembled and timed."""
        started = time.perf_counter()
        brick = assemble(tree, selection.library, self.backbone)
        self.seconds[label] = time.perf_counter() - started
        role = role_of(selection.card_of(tree))
        notes = [note(selection.cards[str(ref)].recipe) for ref in bricks(tree)]
        said = next(filter(None, notes), None)
        return Body(label, brick, identity_of(tree, brick), role, tree, said)

    def record(self, selection: Selection, folder: Path) -> dict[str, Any]:
        """The part of the record that every evaluation has; writes the examples' file."""
        same = unchanged(self.backbone, self.checksum, selection.backbone)
        card = selection.card_of(selection.trees[0]) if len(selection.trees) == 1 else None
        examples = self.scorer.shelf.write(folder)
        return {
            "brick": None if card is None else brick_entry(card, selection.library),
            **backbone_entries(self.backbone, same),
            "cost": {"peak_memory_bytes": peak_memory()},
            **({"examples": examples} if examples else {}),
        }


def open_scene(config: dict[str, Any], inputs: Inputs, shelf: Shelf) -> Scene:
    """Loads the backbone, encodes the tasks and assembles every body.

    Args:
        config: the run's config.
        inputs: what its ``check`` found.
        shelf: what earlier records hold.
    """
    selection = inputs.selection
    backbone, checksum = open_backbone(selection.backbone, selection.section)
    scorer = scorer_for(inputs.tasks, backbone, selection.backbone, config, shelf)
    scene = Scene(backbone, checksum, [], {}, scorer, {})
    for label, tree in zip(selection.labels, selection.trees, strict=True):
        scene.bodies.append(scene.body(label, tree, selection))
    scene.heads.update(heads_of(scene.bodies))
    return scene
