"""Bricks in and out of the library: what a card says becomes a module, and the other way round."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safetensors.torch import load

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.heads import Head
from cfm_train.bricks.kinds import brick_class
from cfm_train.errors import UserError
from cfm_train.library import gate
from cfm_train.library.card import HEADS_FILE, Card
from cfm_train.library.peft_format import CONFIG_FILE, TENSOR_FILE, aside_tensors
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
        requires=[backbone.fingerprint, *brick.needs()],
        backbone_id=backbone.id,
        heads=brick.describe_heads(),
        interface=brick.interface(),
        **known,
    )
    return library.add(brick.files(), card)


def open_brick(card: Card, library: Library, backbone: Backbone) -> Brick:
    """A brick from the library, ready to plug in.

    Raises:
        UserError: the files differ from the card, hold a NaN, belong to another backbone, or
            replace one of its modules.
    """
    gate.require_backbone(card, backbone.fingerprint, backbone.id)
    folder = library.folder(card)
    gate.check_artifact(card, folder)
    files = {name: (folder / name).read_bytes() for name in card.files}
    _check_whole_modules(card, files, backbone)
    brick = brick_class(card.kind).restore(card.interface, files, backbone)
    open_heads(brick, card, library)
    return brick.to(backbone.device).eval().requires_grad_(False)


def _check_whole_modules(card: Card, files: Mapping[str, bytes], backbone: Backbone) -> None:
    """Refuses an adapter that comes with weights of its own for a module of the backbone.

    A classifier that PEFT trained beside an adapter is left out, for the backbone has none; a
    language model's head or embedding that it trained is another one than the backbone's.
    """
    config = json.loads(files.get(CONFIG_FILE, b"{}"))
    if not config.get("modules_to_save"):
        return
    trained = aside_tensors(config, load(files[TENSOR_FILE]))
    for module in config["modules_to_save"]:
        own = any(f".{name}".endswith(f".{module}") for name, _ in backbone.model.named_modules())
        if own and any(f".{module}." in f".{name}" for name in trained):
            raise UserError(
                f"Brick {card.ref} was trained together with a '{module}' of its own "
                f"(modules_to_save), and a brick never changes the '{module}' of the backbone "
                f"'{backbone.id}': its answers would be others here. Train it without."
            )


def open_heads(brick: Brick, card: Card, library: Library) -> None:
    """Gives a brick the heads that lie with a card.

    Raises:
        UserError: a tensor of a head is missing, or belongs to none.
    """
    path = library.folder(card) / HEADS_FILE
    heads = load(path.read_bytes()) if HEADS_FILE in card.files else {}
    for task, described in card.heads.items():
        head = Head.from_description(described)
        for name, value in head.state_dict().items():
            found = heads.pop(f"{task}.{name}", None)
            if found is None or found.shape != value.shape:
                raise UserError(
                    f"The head '{task}' of brick {card.ref} lacks the tensor '{name}' of shape "
                    f"{tuple(value.shape)}: add or train it again."
                )
            value.copy_(found)
        brick.add_head(task, head)
    if heads:
        raise UserError(
            f"Brick {card.ref} has the tensor '{min(heads)}' of a head that its card does not "
            "name: add or train it again."
        )
