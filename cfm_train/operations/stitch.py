"""Make one brick of several that act one after the other, or side by side.

check    bricks, backbone, mode, sites and widths, tasks: from cards and headers, no torch
run      stitch ─► promises and order effect ─► (both orders, average, each alone on tasks) ─► store

What is stored holds no tensors but heads: its configuration is evaluated each time it is opened.
With ``fold`` it is an ordinary LoRA instead, where the bricks are LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.backbone.fingerprint import tokenizer_hash
from cfm_train.configuration.expression import Call
from cfm_train.data.sources import Checked
from cfm_train.errors import UserError
from cfm_train.library.card import check_name
from cfm_train.operations.selection import Selection, agree, find_tasks, select
from cfm_train.stitching.cards import check_fold, check_heads, check_trees
from cfm_train.stitching.mode import mode_of
from cfm_train.tracking.wandb_setting import resolve_mode


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        selection: bricks and backbone.
        tree: the configuration, versions pinned.
        tasks: the tasks to compare on; empty for none.
        fingerprints: content hashes for the config hash.
    """

    selection: Selection
    tree: Call
    tasks: dict[str, Checked]
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Finds bricks, backbone and tasks and looks whether they fit, without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_name(config["name"])
    resolve_mode(config["tracking"]["mode"])
    mode = mode_of(config["mode"])
    selection = select(config)
    if len(selection.trees) < 2:
        raise UserError("A stitch needs at least two bricks, as in bricks=[lang,sst2].")
    tree = Call("stitch", None, tuple(selection.trees), (("mode", mode.name),))
    parts = check_trees(mode, selection.trees, selection.labels, selection.library)
    check_heads(tree, selection.library)
    if config["fold"]:
        check_fold(parts)
    cards = list(selection.cards.values())
    tasks = find_tasks(config["tasks"], cards, config["data"]) if config["tasks"] else {}
    for name, task in tasks.items():
        if not task.rows.get("test"):
            raise UserError(
                f"The task '{name}' has no test split: give data.test, or leave it out."
            )
    for card in cards:
        for name in card.heads.keys() & tasks.keys():
            agree(card.heads[name], tasks[name].spec, card.ref)
    selection.library.check_writable()
    fingerprints = dict(selection.fingerprints)
    for name, task in tasks.items():
        fingerprints |= {f"data/{name}/{k}": v for k, v in task.fingerprints.items()}
    return Inputs(selection, tree, tasks, fingerprints)


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Stitches, compares and stores; returns the record's own part."""
    from cfm_train.bricks.stored import store
    from cfm_train.configuration.apply import assemble
    from cfm_train.operations.setting import (
        backbone_entries,
        brick_entry,
        open_backbone,
        scorer_for,
        tracked,
        unchanged,
    )
    from cfm_train.operations.stitched import Comparison, compare, probe_of
    from cfm_train.stitching.fold import fold
    from cfm_train.stitching.promises import HALF, TOLERANCE, order_effect, promises, relative
    from cfm_train.stitching.stitch import stitch_bricks
    from cfm_train.tracking.comparison_tables import cells
    from cfm_train.training.cost import peak_memory

    selection = inputs.selection
    backbone, before = open_backbone(selection.backbone, selection.section)
    parts = [assemble(tree, selection.library, backbone) for tree in selection.trees]
    made = stitch_bricks(config["mode"], parts, backbone, selection.labels)
    made.expression = str(inputs.tree)
    brick = fold(made, backbone) if config["fold"] else made
    scorer = scorer_for(inputs.tasks, backbone, selection.backbone, config)
    with tracked(config, folder) as wandb:
        probe = probe_of(backbone, scorer.tasks)
        bare = probe.ask()
        metrics = {"order effect": order_effect(made, probe)}
        checks = promises(made, probe)
        if config["fold"]:
            tolerance = TOLERANCE.get(backbone.dtype, HALF)
            worst = relative(probe.ask(brick), probe.ask(made))
            checks["the folded brick answers as the stitch"] = {
                "value": worst,
                "tolerance": tolerance,
                "passed": worst <= tolerance,
            }
        found, examples = Comparison([], {}, [], {}), None
        if inputs.tasks:
            found = compare(made, parts, inputs.tree, selection, scorer)
            examples = scorer.shelf.write(folder)
        again = bool((probe.ask() == bare).all())
        checks["unplugged equals bare"] = {"value": again, "tolerance": None, "passed": again}
        same = unchanged(backbone, before, selection.backbone)
        parents = [
            {"name": card.name, "version": card.version} for card in selection.cards.values()
        ]
        card = store(
            brick,
            selection.library,
            backbone,
            name=config["name"],
            operation="stitch",
            expression=str(inputs.tree),
            parents=parents,
            tokenizer=tokenizer_hash(selection.backbone.folder),
            recipe={
                **config,
                "backbone": selection.section,
                "parents": {card.ref: card.recipe for card in selection.cards.values()},
            },
            data=[entry for c in selection.cards.values() for entry in c.data],
            metrics=found.own,
            run=folder.name,
        )
        metrics |= found.metrics
        if found.matrix:
            wandb.table("matrix", *cells(found.matrix))
        wandb.summary({name: figure["value"] for name, figure in metrics.items()})
        wandb.artifact(
            card.name,
            "brick",
            selection.library.folder(card),
            {"version": card.version, "expression": str(inputs.tree)},
        )
    print(f"{card.ref} = {inputs.tree}" + (" (folded into one LoRA)" if config["fold"] else ""))
    effect = metrics["order effect"]["value"]
    print(f"order effect: the opposite order changes {effect:.1%} of what the stitch changes")
    if made.mode.tokens:
        print(
            f"virtual tokens: {made.virtual_tokens()}, prefixes first, in the order of the bricks"
        )
    for line in found.lines:
        print(line)
    entries = backbone_entries(backbone, same)
    entries["checks"] |= checks
    return {
        "brick": brick_entry(card, selection.library),
        **entries,
        "metrics": metrics,
        "cost": {
            "peak_memory_bytes": peak_memory(),
            "trainable_parameters": sum(p.numel() for p in brick.parameters()),
        },
        "matrix": found.matrix,
        "wandb": wandb.as_record(),
        **({"examples": examples} if examples else {}),
    }


def rehearse(config: dict[str, Any], inputs: Inputs) -> None:
    """Loads the backbone and stitches, as ``dry_run`` wants to know.

    Raises:
        UserError: the bricks do not fit each other.
    """
    from cfm_train.configuration.apply import assemble
    from cfm_train.operations.setting import open_backbone

    backbone, _ = open_backbone(inputs.selection.backbone, inputs.selection.section)
    assemble(inputs.tree, inputs.selection.library, backbone)
