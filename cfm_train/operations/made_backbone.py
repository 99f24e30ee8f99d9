"""What operations that write a backbone share: its card, and what the record says of it.

The weights lie in a folder of the person's choice; the library holds the card, with the backbone's
fingerprint and a note of what it was made from, which the folder holds too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.backbone.fingerprint import fingerprint, tokenizer_hash
from cfm_train.library.card import Card
from cfm_train.library.store import Library

if TYPE_CHECKING:
    from cfm_train.tracking.wandb_run import WandbRun


def record_backbone(
    config: Mapping[str, Any],
    folder: Path,
    out: Path,
    library: Library,
    *,
    operation: str,
    note: tuple[str, str],
    expression: str,
    sources: Mapping[Path, str],
) -> dict[str, Any]:
    """Puts the card of a backbone made from others into the library, and tells W&B.

    Args:
        config: of the run.
        folder: of the run.
        out: the backbone's folder.
        library: where the card goes.
        operation: what the card calls it.
        note: name and content of the file that says what it was made from, a JSON object.
        expression: what the card says that it is.
        sources: the folder of each backbone that it was made from -> the fingerprint it had when
            the run began.

    Returns:
        The record's part: ``brick``, ``backbone``, ``checks``, ``cost`` and ``wandb``.
    """
    from cfm_train.operations.setting import brick_entry, tracked
    from cfm_train.training.cost import peak_memory

    made = fingerprint(out)
    parents = parents_of(set(sources.values()), made, library)
    with tracked(config, folder) as wandb:
        card = put_backbone(
            config,
            folder,
            out,
            library,
            wandb,
            operation=operation,
            note=note,
            expression=expression,
            parents=parents,
        )
    same = all(fingerprint(source) == before for source, before in sources.items())
    return {
        "brick": brick_entry(card, library, parents),
        "backbone": {"id": out.name, "fingerprint": made, "unchanged": same},
        "checks": {"sources unchanged": {"value": same, "tolerance": None, "passed": same}},
        "cost": {"peak_memory_bytes": peak_memory()},
        "wandb": wandb.as_record(),
    }


def put_backbone(
    config: Mapping[str, Any],
    folder: Path,
    out: Path,
    library: Library,
    wandb: WandbRun,
    *,
    operation: str,
    note: tuple[str, str],
    expression: str,
    **known: Any,
) -> Card:
    """Puts the card of a new backbone into the library, and tells W&B of it.

    Args:
        config, folder, out, library, operation, note, expression: see `record_backbone`.
        wandb: the run's W&B side.
        **known: further fields of the card.
    """
    file, text = note
    card = Card(
        kind="backbone",
        name=config["name"],
        backbone_id=out.name,
        tokenizer=tokenizer_hash(out),
        interface={"fingerprint": fingerprint(out), **json.loads(text)},
        operation=operation,
        expression=expression,
        recipe=dict(config),
        run=folder.name,
        **known,
    )
    card = library.add({file: text.encode()}, card)
    wandb.artifact(card.name, "backbone", library.folder(card), {"version": card.version})
    return card


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
