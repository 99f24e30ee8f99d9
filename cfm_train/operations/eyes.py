"""What runs with finished modality bricks share: the bricks opened, and the encoders they need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cfm_train.errors import UserError
from cfm_train.library.card import Card
from cfm_train.modality.finding import FoundEncoder, find_encoder
from cfm_train.operations.selection import Selection

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.bricks.brick import Brick
    from cfm_train.modality.modality import Modality

KIND = "modality"


def encoders_of(selection: Selection, given: Mapping[str, Any] | None) -> dict[str, FoundEncoder]:
    """The encoders that the modality bricks of a selection were made for, by reference.

    Args:
        selection: the bricks.
        given: the run's ``encoder`` section; None for where each brick's own run found its own.

    Raises:
        UserError: an encoder is missing or another one, or two bricks read the same modality.
    """
    found: dict[str, FoundEncoder] = {}
    cards = [card for card in selection.cards.values() if card.kind == KIND]
    for card in cards:
        fits = given is not None and (len(cards) == 1 or _same_kind(card, given))
        section = given if fits else card.recipe.get("encoder")
        if section is None:
            raise UserError(
                f"The library does not say where the encoder of {card.ref} lies: choose it with "
                "encoder=NAME encoder.path=FOLDER."
            )
        one = find_encoder(section)
        wanted = card.interface["hyper"]["encoder"]["fingerprint"]
        if one.fingerprint != wanted:
            raise UserError(
                f"{card.ref} was made for the encoder {wanted[:12]}, and this one is "
                f"{one.fingerprint[:12]}: give the same weights and settings "
                "(encoder=NAME encoder.path=FOLDER)."
            )
        if any(other.modality == one.modality for other in found.values()):
            raise UserError(f"Two bricks read <{one.modality}>: plug one of them at a time.")
        found[card.ref] = one
    return found


def _same_kind(card: Card, given: Mapping[str, Any]) -> bool:
    return bool(card.interface["hyper"]["encoder"]["kind"] == given.get("kind"))


def open_bricks(
    selection: Selection, backbone: Backbone
) -> tuple[list[Brick], dict[str, Modality]]:
    """The bricks of a selection, and those of them that read a modality, by reference.

    Each modality brick gets a placeholder of its own.
    """
    from cfm_train.configuration.apply import assemble
    from cfm_train.modality.modality import SENTINEL, Modality

    bricks = [assemble(tree, selection.library, backbone) for tree in selection.trees]
    reading = {
        str(tree): brick
        for tree, brick in zip(selection.trees, bricks, strict=True)
        if isinstance(brick, Modality)
    }
    for place, brick in enumerate(reading.values()):
        brick.sentinel = SENTINEL - place
    return bricks, reading
