"""What operations share that make a brick of facts of another one, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.data.facts import Fact
    from cfm_train.library.card import Card
    from cfm_train.operations.selection import Selection
    from cfm_train.tracking.wandb_run import WandbRun


def others_check(brick: Any) -> str:
    """What is tried where a brick has more or fewer facts: each other one by itself.

    Without a gate all facts act at once, so what is said changes with them: it is not claimed.
    """
    others = "the others' answers are as they were"
    return others if brick.gate is not None else f"{others}, each fact by itself"


def same_answers(
    backbone: Backbone,
    one: Any,
    one_at: Sequence[int],
    other: Any,
    other_at: Sequence[int],
    facts: Sequence[Fact],
) -> bool:
    """Whether two bricks give some facts' prompts the same logits, to the bit.

    Args:
        backbone: the backbone.
        one, other: the bricks.
        one_at, other_at: where the facts stand in each.
        facts: the facts.
    """
    import torch

    from cfm_train.knowledge.fact_figures import logits_of

    now = logits_of(backbone, one, facts, one_at)
    then = logits_of(backbone, other, facts, other_at)
    return all(torch.equal(a, b) for a, b in zip(now, then, strict=True))


def store_changed(
    config: Mapping[str, Any],
    selection: Selection,
    old: Card,
    brick: Any,
    backbone: Backbone,
    folder: Path,
    wandb: WandbRun,
    **told: Any,
) -> Card:
    """Stores a brick that was made of another one without training.

    ``told`` is what the card says beside that: its data, its metrics.
    """
    from cfm_train.bricks.stored import store

    card = store(
        brick,
        selection.library,
        backbone,
        name=config["name"],
        tokenizer=old.tokenizer,
        operation=config["operation"],
        parents=[{"name": old.name, "version": old.version}],
        recipe={**config, "backbone": selection.section, "parents": {old.ref: old.recipe}},
        run=folder.name,
        **told,
    )
    version = {"version": card.version}
    wandb.artifact(card.name, "brick", selection.library.folder(card), version)
    return card


def changed_entries(
    card: Card,
    selection: Selection,
    brick: Any,
    backbone: Backbone,
    same: bool,
    checks: Mapping[str, bool],
) -> dict[str, Any]:
    """What a record says of such a brick; ``same``: whether the backbone is what it was."""
    from cfm_train.operations.setting import backbone_entries, brick_entry

    entries = backbone_entries(backbone, same)
    for name, passed in checks.items():
        entries["checks"][name] = {"value": passed, "tolerance": None, "passed": passed}
    return {
        "brick": brick_entry(card, selection.library),
        **entries,
        "cost": {"trainable_parameters": sum(p.numel() for p in brick.parameters())},
    }
