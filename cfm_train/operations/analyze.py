"""Gather statistics of bricks on what each was trained on, and keep them beside the bricks.

That is the training rows of its own task, or the text of its documents.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.configuration.expression import BrickRef
from cfm_train.data.sources import Checked
from cfm_train.errors import UserError
from cfm_train.knowledge.documents import Documents, read
from cfm_train.library.card import Card
from cfm_train.merging.sidecars import FACTS, TENSORS
from cfm_train.operations.selection import Selection, agree, find_tasks, own_sections, select
from cfm_train.tracking.wandb_setting import resolve_mode

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.data.encode import TaskData


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        selection: the bricks.
        learnt: what each brick was trained on, by reference.
        fingerprints: content hashes for the config hash.
    """

    selection: Selection
    learnt: dict[str, Checked | Documents]
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Finds bricks, backbone and what each was trained on, without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    resolve_mode(config["tracking"]["mode"])
    selection = select(config)
    learnt: dict[str, Checked | Documents] = {}
    for tree in selection.trees:
        if not isinstance(tree, BrickRef):
            raise UserError(f"'{tree}' is no single brick: store it under a name first.")
        card = selection.cards[str(tree)]
        _check_sites(card)
        if card.operation == "study":
            learnt[card.ref] = read(card.recipe["data"])
        else:
            learnt[card.ref] = _own_task(card, config["data"])
    given = [key for key in ("root", "limit") if config["data"][key] is not None]
    if given and not any(isinstance(one, Checked) for one in learnt.values()):
        raise UserError(
            f"data.{given[0]} is for bricks of tasks, and these were trained on documents: leave "
            "it out; rows=N says how many blocks are read."
        )
    selection.library.check_writable()
    fingerprints = dict(selection.fingerprints)
    for ref, one in learnt.items():
        fingerprints |= {f"data/{ref}/{k}": v for k, v in one.fingerprints.items()}
    return Inputs(selection, learnt, fingerprints)


def _check_sites(card: Card) -> None:
    """Refuses a brick that changes what attention reads: there is no map to see the inputs of."""
    for site in card.sites:
        if site.rpartition(".")[2] in ("attn", "cross"):
            raise UserError(
                f"{card.ref} adds keys and values at '{site}', and statistics are of the inputs of "
                "maps: leave it out; such bricks are plugged in together, or stitched."
            )


def _own_task(card: Card, data: dict[str, Any]) -> Checked:
    """The one task that a brick was trained on.

    Raises:
        UserError: it was trained on several or on none, or on other labels than the data hold.
    """
    own = list(own_sections([card]))
    if len(own) != 1:
        raise UserError(
            f"{card.ref} was trained on {len(own)} tasks, and statistics are of one: leave it out."
        )
    task = next(iter(find_tasks(own, [card], data).values()))
    if task.spec.name in card.heads:
        agree(card.heads[task.spec.name], task.spec, card.ref)
    return task


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Gathers and stores; returns the record's own part."""
    from safetensors.torch import save
    from tqdm import tqdm

    from cfm_train.bricks.stored import open_brick
    from cfm_train.operations.setting import backbone_entries, open_backbone, tracked, unchanged
    from cfm_train.statistics.observer import observed_sites
    from cfm_train.training.cost import peak_memory

    kind, rows = config["statistic"], config["rows"]
    gather = importlib.import_module(f"cfm_train.statistics.{kind}").gather
    selection = inputs.selection
    backbone, before = open_backbone(selection.backbone, selection.section)
    bricks = {
        ref: open_brick(selection.cards[ref], selection.library, backbone) for ref in inputs.learnt
    }
    sites = observed_sites(list(bricks.values()), backbone)
    with tracked(config, folder) as wandb:
        for ref, brick in bricks.items():
            card = selection.cards[ref]
            encoded = _encoded(inputs.learnt[ref], card, backbone)
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
                "task": encoded.spec.name,
                "data": _printed(inputs.learnt[ref]),
                "sites": sites,
            }
            sidecar = selection.library.sidecar(card, _hash(about))
            sidecar.write(TENSORS.format(kind=kind), save(found))
            sidecar.write(FACTS.format(kind=kind), json.dumps(about, indent=2).encode())
            print(f"{kind} of {card.ref}: {size} rows of {encoded.spec.name}, {len(sites)} sites")
        same = unchanged(backbone, before, selection.backbone)
    return {
        **backbone_entries(backbone, same),
        "cost": {"peak_memory_bytes": peak_memory()},
        "wandb": wandb.as_record(),
    }


def _encoded(learnt: Checked | Documents, card: Card, backbone: Backbone) -> TaskData:
    """What a brick was trained on, as rows of tokens; documents in the blocks of their training."""
    from cfm_train.data.encode import TaskData, encode
    from cfm_train.data.tasks import TaskSpec
    from cfm_train.knowledge.tokens import Reader
    from cfm_train.paths import cache_dir

    if isinstance(learnt, Checked):
        return encode(learnt, backbone.tokenizer, cache_dir())
    data = card.recipe["data"]
    reader = Reader(learnt, backbone.tokenizer, data["max_length"], data["context"])
    spec = TaskSpec(card.name, "causal", None, "loss", False, ("text",))
    return TaskData(spec, reader.blocks(learnt.rows, []), None, None)


def _printed(learnt: Checked | Documents) -> str:
    """The content hash of the rows that are read."""
    return learnt.fingerprints["train" if isinstance(learnt, Checked) else "data/documents"]


def _hash(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
