"""Make one brick from several; the new brick names its parents with their versions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.backbone.fingerprint import tokenizer_hash
from cfm_train.configuration.expression import BrickRef, Expression
from cfm_train.errors import UserError
from cfm_train.library.card import check_name
from cfm_train.operations.selection import Selection, select
from cfm_train.tracking.wandb_run import resolve_mode


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        selection: bricks and backbone.
        weights: one number for each brick.
        fingerprints: content hashes for the config hash.
    """

    selection: Selection
    weights: list[float]
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Finds bricks and backbone, without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_name(config["name"])
    resolve_mode(config["tracking"]["mode"])
    selection = select(config)
    if len(selection.trees) < 2:
        raise UserError("A merge needs at least two bricks, as in bricks=[sst2,trec].")
    weights = config["weights"]
    if weights is None:
        weights = [1 / len(selection.trees)] * len(selection.trees)
    if len(weights) != len(selection.trees):
        raise UserError(
            f"weights has {len(weights)} numbers for {len(selection.trees)} bricks: give one each."
        )
    kinds = {card.kind for card in selection.cards.values()}
    if len(kinds) > 1:
        raise UserError(
            f"Bricks of the kinds {' and '.join(sorted(kinds))} cannot be averaged: use one kind."
        )
    selection.library.check_writable()
    return Inputs(selection, [float(w) for w in weights], selection.fingerprints)


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Merges and stores; returns the record's own part."""
    from cfm_train.bricks.stored import store
    from cfm_train.configuration.apply import assemble, merge_bricks, merge_rule
    from cfm_train.configuration.expression import Call
    from cfm_train.operations.setting import (
        backbone_entries,
        brick_entry,
        open_backbone,
        tracked,
        unchanged,
    )
    from cfm_train.training.cost import peak_memory

    selection = inputs.selection
    # Merge arithmetic is done in float32 and cast once, so the backbone's dtype does not matter.
    backbone, before = open_backbone(selection.backbone, selection.section)
    bodies = [assemble(tree, selection.library, backbone) for tree in selection.trees]
    with tracked(config, folder) as wandb:
        merged = merge_bricks(config["rule"], bodies, inputs.weights, backbone)
        tree = Call(
            "merge", config["rule"], tuple(selection.trees), (("weights", tuple(inputs.weights)),)
        )
        parents = [
            {"name": card.name, "version": card.version} for card in selection.cards.values()
        ]
        recipes = {card.ref: card.recipe for card in selection.cards.values()}
        promises = merge_rule(config["rule"]).invariants(bodies, backbone)
        card = store(
            merged,
            selection.library,
            backbone,
            name=config["name"],
            operation="merge",
            expression=str(tree),
            parents=parents,
            tokenizer=tokenizer_hash(selection.backbone.folder),
            recipe={**config, "backbone": selection.section, "parents": recipes},
            data=[entry for c in selection.cards.values() for entry in c.data],
            run=folder.name,
        )
        same = unchanged(backbone, before, selection.backbone)
        wandb.artifact(
            card.name,
            "brick",
            selection.library.folder(card),
            {"version": card.version, "expression": str(tree)},
        )
    print(f"{card.ref} = {tree}")
    shares: dict[str, float] = {}
    for part, weight in zip(selection.trees, inputs.weights, strict=True):
        for ref, share in parts_of(part, weight):
            shares[ref] = shares.get(ref, 0.0) + share
    weighted = [
        {**parent, "weight": shares[f"{parent['name']}@{parent['version']}"]} for parent in parents
    ]
    entries = backbone_entries(backbone, same)
    entries["checks"] |= promises
    return {
        "brick": brick_entry(card, selection.library, weighted),
        **entries,
        "cost": {
            "peak_memory_bytes": peak_memory(),
            "trainable_parameters": sum(p.numel() for p in merged.parameters()),
        },
        "wandb": wandb.as_record(),
    }


def parts_of(tree: Expression, weight: float) -> Iterator[tuple[str, float]]:
    """The bricks of a configuration that is given a weight, and how much of it falls on each."""
    if isinstance(tree, BrickRef):
        yield str(tree), weight
        return
    given = dict(tree.params).get("weights")
    shares = given if isinstance(given, tuple) else [1 / len(tree.args)] * len(tree.args)
    for part, share in zip(tree.args, shares, strict=True):
        yield from parts_of(part, weight * float(share))  # type: ignore[arg-type]
