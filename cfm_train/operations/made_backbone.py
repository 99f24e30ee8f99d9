"""What operations that write a backbone share: its card, and the cards that it was made from.

The weights lie in a folder of the person's choice; the library holds the card, with the backbone's
fingerprint and a note of what it was made from, which the folder holds too.
"""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

from cfm_train.backbone.fingerprint import tokenizer_hash
from cfm_train.library.card import Card
from cfm_train.library.store import Library


def store_backbone(
    out: Path, library: Library, *, note: tuple[str, str], made: str, **known: Any
) -> Card:
    """Puts the card of a new backbone into the library.

    Args:
        out: the backbone's folder.
        library: where to.
        note: name and content of the file that says what it was made from, a JSON object.
        made: the backbone's fingerprint.
        **known: more fields of the card: ``name``, ``operation``, ``expression``, …
    """
    file, text = note
    card = Card(
        kind="backbone",
        backbone_id=out.name,
        tokenizer=tokenizer_hash(out),
        interface={"fingerprint": made, **json.loads(text)},
        **known,
    )
    return library.add({file: text.encode()}, card)


def parents_of(fingerprints: Set[str], made: str, library: Library) -> list[dict[str, str]]:
    """The sources that are artifacts of the library themselves, by fingerprint.

    Args:
        fingerprints: of the sources.
        made: of the new backbone: one that equals its source is not its own parent.
        library: where their cards would be.
    """
    wanted = fingerprints - {made}
    found = []
    for card in library.cards():
        if card.kind == "backbone" and card.interface.get("fingerprint") in wanted:
            found.append({"name": card.name, "version": card.version})
    return found
