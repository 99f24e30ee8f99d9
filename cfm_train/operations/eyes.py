"""What runs with finished modality bricks share: the bricks opened, the encoders they need, and the
rows that they are asked about, with the features of their items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.data.rows import Row
from cfm_train.errors import UserError
from cfm_train.library.card import Card
from cfm_train.modality.finding import FoundEncoder, find_encoder, looks
from cfm_train.modality.items import Reader, hashes, read_rows
from cfm_train.operations.align import open_cache
from cfm_train.operations.selection import Selection

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.bricks.brick import Brick
    from cfm_train.modality.asking import Sense
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


def read_asked(
    selection: Selection, encoders: Mapping[str, FoundEncoder], data: Mapping[str, Any]
) -> tuple[list[Row], Reader]:
    """The rows that bricks are asked about, and what reads their items.

    Args:
        selection: the bricks.
        encoders: see `encoders_of`.
        data: the run's ``data`` section; without ``prompt`` that of the first modality brick's
            training counts.

    Raises:
        UserError: no brick reads a modality, or a row cannot be used.
    """
    if not encoders:
        raise UserError(
            "bricks names no modality brick, which items need: train one with "
            "recipe=modality/align."
        )
    prompt = data["prompt"]
    if prompt is None:
        trained = selection.cards[next(iter(encoders))].recipe.get("data", {})
        prompt = trained.get("prompt", "<item>")
    place = Path(data["items"]).expanduser()
    reader = Reader(data["root"], place if place.is_dir() else place.parent)
    kinds = [encoder.modality for encoder in encoders.values()]
    asked = {**data, "prompt": prompt}
    rows = read_rows(data["items"], asked, kinds, reader, looks(encoders))
    return rows[: data["limit"]], reader


def open_senses(
    config: Mapping[str, Any],
    encoders: Mapping[str, FoundEncoder],
    reading: Mapping[str, Modality],
    rows: Sequence[Row],
    reader: Reader,
) -> dict[str, Sense]:
    """The modalities of a run by name, the features of all rows' items in their caches.

    Args:
        config: ``cache``.
        encoders: see `encoders_of`.
        reading: see `open_bricks`.
        rows: the rows.
        reader: reads their items.

    Raises:
        UserError: an item cannot be read, or the features would take too much.
    """
    from cfm_train.modality.asking import Sense

    senses = {}
    for ref, brick in reading.items():
        encoder, cache = encoders[ref], open_cache(dict(config), encoders[ref])
        want = {
            item: (reference, row["_at"])
            for row in rows
            for item, reference, kind in zip(hashes(row), row["_items"], row["_kinds"], strict=True)
            if kind == brick.modality
        }
        if any(item not in cache.index for item in want):
            opened = encoder.open().to(brick.get_buffer("mean").device)
            limit = config["cache"]["limit_gb"]
            cache.fill(opened, want, reader.read, limit, encoder.describe())
        senses[brick.modality] = Sense(brick, cache)
    return senses
