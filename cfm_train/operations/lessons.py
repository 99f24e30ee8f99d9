"""What can be wrong with a run on documents, told before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cfm_train.backbone.spec import ResolvedBackbone
from cfm_train.config.compose import option
from cfm_train.config.signature import constants
from cfm_train.errors import UserError
from cfm_train.library import gate
from cfm_train.library.card import Card
from cfm_train.library.store import Library

#: Kinds several of which may be plugged in together: keys and values side by side in attention,
#: and low-rank updates, which add up.
COMPANY = ("cartridge", "document", "lora", "prefix")
#: Keys of `trainer` that a run heeds which trains nothing.
UNTRAINED = ("precision", "deterministic", "threads")


def check_objective(config: Mapping[str, Any]) -> None:
    """Refuses an objective that is missing, or that nothing follows."""
    kind, objective = config["brick"]["kind"], config["objective"]
    trains = constants("bricks", kind, "Brick").get("trains", True)
    if trains and objective is None:
        raise UserError(
            f"A brick of kind {kind} is trained: use recipe=knowledge/lora brick={kind}."
        )
    if not trains:
        if objective is not None:
            raise UserError(
                f"A brick of kind {kind} is not trained, so it has no objective: use "
                "recipe=knowledge/prefix."
            )
        if config["distractors"]:
            raise UserError("distractors are for training, and recipe=knowledge/prefix has none.")
        usual = option("trainer", "default", learning_rate=config["brick"]["learning_rate"])
        for key, given in config["trainer"].items():
            if key not in UNTRAINED and given != usual[key]:
                raise UserError(
                    f"trainer.{key}={given} is for training, and a brick of kind {kind} is not "
                    "trained: leave it out."
                )
        return
    if not objective["learn"]:
        raise UserError("objective.learn is empty: name documents, questions or both.")
    if objective["keep"] and config["data"]["unrelated"] is None:
        raise UserError(
            f"objective.keep={objective['keep']} needs text to be kept: give data.unrelated=FILE."
        )


def check_lengths(
    config: Mapping[str, Any], backbone: ResolvedBackbone, virtual: int, others: int = 0
) -> None:
    """Refuses rows that the backbone cannot read with a passage, or among all distractors.

    Args:
        config: the run's config.
        backbone: the backbone's folder and config.
        virtual: how many tokens the brick puts before a row.
        others: how many its distractors do.
    """
    data = config["data"]
    most = backbone.config.get("max_position_embeddings", backbone.config.get("n_positions"))
    if not isinstance(most, int):
        return
    passage = data["context"] if (config["objective"] or {}).get("with_text") else 0
    among = data["max_length"] + passage + virtual + others
    if others and among > most:
        raise UserError(
            f"data.max_length={data['max_length']},"
            f"{f' data.context={passage},' if passage else ''} the brick's own {virtual} tokens "
            f"and the {others} of its distractors make {among}, and '{backbone.id}' reads {most} "
            "at most: name fewer distractors, or lower data.max_length or brick.tokens."
        )
    needed = data["max_length"] + data["context"] + virtual
    if needed > most:
        own = f" and the brick's own {virtual} tokens" if virtual else ""
        raise UserError(
            f"data.max_length={data['max_length']}, data.context={data['context']}{own} make "
            f"{needed} tokens, and '{backbone.id}' reads {most} at most: lower them"
            f"{', or set brick.tokens' if virtual else ''}."
        )


def distractors(
    config: Mapping[str, Any], library: Library, backbone: str, name: str
) -> list[Card]:
    """The cards of the other bricks.

    Raises:
        UserError: there is no such brick, it is of a kind that has no company, or of another
            backbone.
    """
    cards: list[Card] = []
    if config["distractors"] and config["brick"]["kind"] not in COMPANY:
        raise UserError(
            f"distractors are plugged in beside a cartridge or a LoRA, and brick is a "
            f"{config['brick']['kind']}: use recipe=knowledge/cartridge or knowledge/lora."
        )
    for ref in config["distractors"]:
        card = library.find(ref)
        gate.require_brick(card)
        gate.require_backbone(card, backbone, name)
        if card.kind not in COMPANY:
            raise UserError(
                f"distractors: {card.ref} is a {card.kind}, and only cartridges and LoRA bricks "
                "are plugged in beside another: leave it out."
            )
        if card.ref in [other.ref for other in cards]:
            raise UserError(f"distractors names {card.ref} twice: name each once.")
        cards.append(card)
    return cards
