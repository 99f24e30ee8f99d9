"""Take facts out of a brick of facts: a new brick without them, nothing trained.

Each fact has parameters of its own, so the others' are what they were, and so are their answers, to
the bit; the run tries it. The gate loses the vectors of what is forgotten and keeps its threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.data.facts import from_taught, normalised
from cfm_train.errors import UserError, nearest
from cfm_train.library.card import Card, check_name
from cfm_train.operations.selection import Selection, select
from cfm_train.tracking.wandb_setting import resolve_mode


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        selection: the brick and its backbone.
        card: the brick's card.
        gone: the numbers of the facts to forget.
        fingerprints: content hashes for the config hash.
    """

    selection: Selection
    card: Card
    gone: list[int]
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Finds the brick and the facts in it, without torch.

    Raises:
        UserError: it is no brick of facts, or does not know one of them, or would know none.
    """
    check_name(config["name"])
    resolve_mode(config["tracking"]["mode"])
    selection = select(config)
    card = selection.card_of(selection.trees[0])
    if len(selection.trees) > 1 or card is None:
        raise UserError("bricks: facts are forgotten from one brick, as in bricks=[capitals].")
    facts = card.interface.get("facts")
    if not facts:
        raise UserError(
            f"{card.ref} is no brick of facts ({card.kind}): name one that recipe=knowledge/facts "
            "made."
        )
    gone: set[int] = set()
    for wanted in config["facts"]:
        gone |= _numbers(wanted, facts, card.ref)
    if not gone:
        raise UserError("facts is empty: name subjects, or numbers counted from 0.")
    if len(gone) == len(facts):
        raise UserError(
            f"{card.ref} would know nothing any more: unplug it, or remove it with python -m "
            f"cfm_train.library rm {card.ref}."
        )
    selection.library.check_writable()
    return Inputs(selection, card, sorted(gone), selection.fingerprints)


def _numbers(wanted: str, facts: list[dict[str, Any]], ref: str) -> set[int]:
    """The facts that a subject or a number means."""
    named = {at for at, f in enumerate(facts) if normalised(f["subject"]) == normalised(wanted)}
    if named:
        return named
    if wanted.isdecimal() and int(wanted) < len(facts):
        return {int(wanted)}
    hint = nearest(wanted, {fact["subject"] for fact in facts})
    raise UserError(f"facts: {ref} knows nothing about '{wanted}' ({len(facts)} facts).{hint}")


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Makes the smaller brick, tries that the rest is as it was, and stores it."""
    from cfm_train.bricks.stored import open_brick
    from cfm_train.operations.changed import (
        changed_entries,
        others_check,
        same_answers,
        store_changed,
    )
    from cfm_train.operations.setting import open_backbone, tracked, unchanged

    selection, old = inputs.selection, inputs.card
    section = {**selection.section, "dtype": "float32"}
    backbone, before = open_backbone(selection.backbone, section)
    whole: Any = open_brick(old, selection.library, backbone)
    kept = [at for at in range(len(whole)) if at not in inputs.gone]
    brick = whole.only(kept, backbone).eval().requires_grad_(False)
    facts = [from_taught(whole.facts[at]) for at in kept]
    with tracked(config, folder) as wandb:
        same_said = same_answers(backbone, brick, range(len(kept)), whole, kept, facts)
        checks = {others_check(brick): same_said}
        if brick.gate is not None:
            forgotten = [from_taught(whole.facts[at]) for at in inputs.gone]
            found = brick.gate.find([text for fact in forgotten for text in fact.prompts])
            left = {normalised(fact.subject) for fact in facts}
            asked = [normalised(fact.subject) for fact in forgotten for _ in fact.prompts]
            checks["the gate no longer finds what is forgotten"] = all(
                f < 0 or s in left for f, s in zip(found, asked, strict=True)
            )
        same = unchanged(backbone, before, selection.backbone)
        card = store_changed(config, selection, old, brick, backbone, folder, wandb, data=old.data)
    gone = ", ".join(sorted({whole.facts[at]["subject"] for at in inputs.gone})[:5])
    print(f"{card.ref} knows {len(kept)} of {len(whole)} facts; forgotten: {gone}")
    return changed_entries(card, selection, brick, backbone, same, checks) | {
        "wandb": wandb.as_record()
    }
