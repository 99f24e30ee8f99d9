"""Bricks in and out of the library: what a card says becomes a module, and the other way round."""

from __future__ import annotations

from typing import Any

from safetensors.torch import load

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import HEADS_FILE, Brick
from cfm_train.bricks.heads import Head
from cfm_train.bricks.kinds import brick_class
from cfm_train.errors import UserError
from cfm_train.library import gate
from cfm_train.library.card import Card
from cfm_train.library.store import Library


def store(brick: Brick, library: Library, backbone: Backbone, **known: Any) -> Card:
    """Puts a brick into the library.

    Args:
        brick: the brick, trained or made otherwise.
        library: where to.
        backbone: the backbone that it needs.
        **known: more fields of the card: ``name``, ``operation``, ``recipe``, ``metrics``, …

    Returns:
        The card as stored, with its version.
    """
    card = Card(
        kind=brick.kind,
        granularity=brick.granularity,
        sites=list(brick.site_names),
        requires=[backbone.fingerprint],
        backbone_id=backbone.id,
        heads=brick.describe_heads(),
        interface=brick.interface(),
        **known,
    )
    return library.add(brick.files(), card)


def open_brick(card: Card, library: Library, backbone: Backbone) -> Brick:
    """A brick from the library, ready to plug in.

    Raises:
        UserError: the files differ from the card, hold a NaN, or belong to another backbone.
    """
    gate.require_backbone(card, backbone.fingerprint, backbone.id)
    folder = library.folder(card)
    gate.check_artifact(card, folder)
    files = {name: (folder / name).read_bytes() for name in card.files}
    brick = brick_class(card.kind).restore(card.interface, files, backbone)
    heads = load(files[HEADS_FILE]) if HEADS_FILE in files else {}
    for task, described in card.heads.items():
        head = Head.from_description(described)
        state = {
            name.removeprefix(f"{task}."): value
            for name, value in heads.items()
            if name.startswith(f"{task}.")
        }
        if state.keys() != head.state_dict().keys():
            raise UserError(
                f"The head '{task}' of brick {card.ref} is incomplete: add or train it again."
            )
        head.load_state_dict(state)
        brick.add_head(task, head)
    return brick.to(backbone.device).eval().requires_grad_(False)
