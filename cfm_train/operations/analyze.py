"""Gather statistics of bricks on their own tasks, and keep them beside the bricks."""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.configuration.expression import BrickRef
from cfm_train.data.sources import Checked
from cfm_train.errors import UserError
from cfm_train.merging.sidecars import FACTS, TENSORS
from cfm_train.operations.selection import Selection, agree, find_tasks, own_sections, select
from cfm_train.tracking.wandb_setting import resolve_mode


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        selection: the bricks.
        tasks: each brick's own task, by reference.
        fingerprints: content hashes for the config hash.
    """

    selection: Selection
    tasks: dict[str, Checked]
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Finds bricks, backbone and each brick's own task, without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    resolve_mode(config["tracking"]["mode"])
    selection = select(config)
    tasks = {}
    for tree in selection.trees:
        if not isinstance(tree, BrickRef):
            raise UserError(f"'{tree}' is no single brick: store it under a name first.")
        card = selection.cards[str(tree)]
        own = list(own_sections([card]))
        if len(own) != 1:
            raise UserError(
                f"{card.ref} was trained on {len(own)} tasks, and statistics are of one: leave it "
                "out."
            )
        found = find_tasks(own, [card], config["data"])
        task = next(iter(found.values()))
        if task.spec.name in card.heads:
            agree(card.heads[task.spec.name], task.spec, card.ref)
        tasks[card.ref] = task
    selection.library.check_writable()
    fingerprints = dict(selection.fingerprints)
    for ref, task in tasks.items():
        fingerprints |= {f"data/{ref}/{k}": v for k, v in task.fingerprints.items()}
    return Inputs(selection, tasks, fingerprints)


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Gathers and stores; returns the record's own part."""
    from safetensors.torch import save
    from tqdm import tqdm

    from cfm_train.bricks.stored import open_brick
    from cfm_train.data.encode import encode
    from cfm_train.operations.setting import backbone_entries, open_backbone, tracked, unchanged
    from cfm_train.paths import cache_dir
    from cfm_train.statistics.observer import observed_sites
    from cfm_train.training.cost import peak_memory

    kind, rows = config["statistic"], config["rows"]
    gather = importlib.import_module(f"cfm_train.statistics.{kind}").gather
    selection = inputs.selection
    backbone, before = open_backbone(selection.backbone, selection.section)
    bricks = {
        ref: open_brick(selection.cards[ref], selection.library, backbone) for ref in inputs.tasks
    }
    sites = observed_sites(list(bricks.values()))
    sites = [name for name in backbone.sites if name in sites]
    with tracked(config, folder) as wandb:
        for ref, brick in bricks.items():
            card, task = selection.cards[ref], inputs.tasks[ref]
            encoded = encode(task, backbone.tokenizer, cache_dir())
            size = min(rows, len(encoded.train))
            with tqdm(total=size, desc=f"{kind} of {card.name}", unit="row") as bar:
                found = gather(
                    backbone,
                    brick,
                    encoded,
                    sites,
                    rows=rows,
                    seed=config["seed"],
                    progress=bar.update,
                )
            about = {
                "rows": size,
                "seed": config["seed"],
                "task": task.spec.name,
                "data": task.fingerprints["train"],
                "sites": sites,
            }
            sidecar = selection.library.sidecar(card, _hash(about))
            sidecar.write(TENSORS.format(kind=kind), save(found))
            sidecar.write(FACTS.format(kind=kind), json.dumps(about, indent=2).encode())
            print(f"{kind} of {card.ref}: {size} rows of {task.spec.name}, {len(sites)} sites")
        same = unchanged(backbone, before, selection.backbone)
    return {
        **backbone_entries(backbone, same),
        "cost": {"peak_memory_bytes": peak_memory()},
        "wandb": wandb.as_record(),
    }


def _hash(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
