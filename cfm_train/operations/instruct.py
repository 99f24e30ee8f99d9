"""Train a LoRA beside a connector that was aligned before: the second stage of a modality brick.

check    the aligned brick, its backbone and encoder, every row and every item, without torch
run      brick opened, a new one beside it ─► trained, judged and stored (`aligned`) ─► record

The connector goes on from where it was (LLaVA's second stage, with a LoRA in place of the whole
language model). Two bricks are stored: NAME, made from the aligned one, and NAME-lora, which
belongs beside it: bricks=[NAME,NAME-lora].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.data.sources import data_fingerprints
from cfm_train.errors import UserError
from cfm_train.library.card import check_name
from cfm_train.modality.finding import looks
from cfm_train.modality.items import check_items
from cfm_train.operations import align, trained
from cfm_train.operations.eyes import encoders_of, open_bricks
from cfm_train.operations.selection import Selection, select
from cfm_train.tracking.wandb_setting import resolve_mode

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.bricks.brick import Brick
    from cfm_train.modality.cache import FeatureCache


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        selection: the aligned brick and its backbone.
        ref: the aligned brick.
        items: encoder, rows, and what reads their items.
        fingerprints: content hashes for the config hash.
    """

    selection: Selection
    ref: str
    items: align.Inputs
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Checks everything that the run needs, without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    for name in names(config):
        check_name(name)
    resolve_mode(config["tracking"]["mode"])
    trained.check_kind(config["brick"]["kind"])
    selection = select(config)
    encoders = encoders_of(selection, config["encoder"])
    if len(encoders) != 1 or len(selection.trees) != 1:
        raise UserError(
            "bricks must name one modality brick, from which the stage goes on: train one with "
            "recipe=modality/align, then bricks=[ITS_NAME]."
        )
    ((ref, encoder),) = encoders.items()
    data = dict(config["data"])
    if data["prompt"] is None:
        data["prompt"] = selection.cards[ref].recipe.get("data", {}).get("prompt", "<item>")
    checked, reader = check_items(data, encoder.modality, config["name"], looks(encoders))
    selection.library.check_writable()
    fingerprints = {
        **selection.fingerprints,
        "encoder": encoder.fingerprint,
        **data_fingerprints({"items": checked}),
    }
    items = align.Inputs(
        selection.backbone, encoder, checked, reader, selection.library, fingerprints
    )
    return Inputs(selection, ref, items, fingerprints)


def names(config: dict[str, Any]) -> tuple[str, str]:
    """What the two bricks are called: the connector, and the one beside it."""
    return config["name"], f"{config['name']}-{config['brick']['kind']}"


def rehearse(config: dict[str, Any], inputs: Inputs) -> None:
    """Builds the bricks for the backbone, as ``dry_run`` wants.

    Raises:
        UserError: the brick does not fit the backbone.
    """
    from cfm_train.operations.setting import open_backbone

    print(trained.rows_line(inputs.items.checked))
    selection = inputs.selection
    backbone, _ = open_backbone(selection.backbone, selection.section, config["trainer"])
    start(config, inputs, backbone)


def start(config: dict[str, Any], inputs: Inputs, backbone: Backbone) -> dict[str, Brick]:
    """The aligned brick, ready to learn, and a new one; asserts that the stage trains these alone.

    Raises:
        UserError: the new brick does not fit the backbone.
    """
    from cfm_train.bricks.kinds import make_brick
    from cfm_train.modality.stages import assert_trainable
    from cfm_train.training.seeding import reseed

    _, reading = open_bricks(inputs.selection, backbone)
    eyes = reading[inputs.ref].train().requires_grad_(True)
    reseed(config["seed"], "brick")
    beside = make_brick(config["brick"]).build(backbone)
    assert_trainable("instruct", {"brick": eyes, "beside": beside, "backbone": backbone})
    return dict(zip(names(config), (eyes, beside), strict=True))


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Trains, judges and stores; returns the record's own part.

    Raises:
        RuntimeError: training diverged; the message names step and rows.
    """
    from cfm_train.operations.aligned import train_on_items

    def begin(backbone: Backbone, width: int, cache: FeatureCache) -> dict[str, Brick]:
        return start(config, inputs, backbone)

    card, section = inputs.selection.cards[inputs.ref], inputs.selection.section
    # The bricks' cards say where backbone and encoder lie, and what the rows were asked.
    found = {"backbone": section, "encoder": inputs.items.encoder.section}
    found["data"] = {**config["data"], "prompt": inputs.items.checked.section["prompt"]}
    return train_on_items(
        {**config, **found},
        inputs.items,
        folder,
        begin,
        section=section,
        parents=[{"name": card.name, "version": card.version}],
    )
