"""Score any bricks on any tasks: the brick × task matrix, every cell with its interval."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.data.sources import Checked, data_fingerprints
from cfm_train.operations.selection import Selection, agree, find_tasks, select
from cfm_train.tracking.wandb_run import resolve_mode


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        selection: bricks and backbone.
        tasks: the tasks with all their rows.
        fingerprints: content hashes for the config hash.
    """

    selection: Selection
    tasks: dict[str, Checked]
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Finds bricks, backbone and tasks, without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    resolve_mode(config["tracking"]["mode"])
    selection = select(config)
    tasks = find_tasks(config["tasks"], list(selection.cards.values()), config["data"])
    for card in selection.cards.values():
        for name in card.heads.keys() & tasks.keys():
            agree(card.heads[name], tasks[name].spec, card.ref)
    return Inputs(selection, tasks, selection.fingerprints | data_fingerprints(tasks))


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Fills the matrix and returns the record's own part."""
    from cfm_train.config.compose import option
    from cfm_train.configuration.apply import assemble
    from cfm_train.data.encode import encode
    from cfm_train.evaluation.floor import floor_of
    from cfm_train.evaluation.matrix import heads_of, row
    from cfm_train.operations.setting import (
        backbone_entries,
        brick_entry,
        open_backbone,
        tracked,
        unchanged,
    )
    from cfm_train.paths import cache_dir
    from cfm_train.training.cost import peak_memory

    selection = inputs.selection
    backbone, before = open_backbone(selection.backbone, selection.section)
    tasks = {n: encode(t, backbone.tokenizer, cache_dir()) for n, t in inputs.tasks.items()}
    trainer = option("trainer", "default", learning_rate=1e-3)
    bodies = [assemble(tree, selection.library, backbone) for tree in selection.trees]
    heads = heads_of(bodies)
    with tracked(config, folder) as wandb:
        matrix: list[dict[str, Any]] = []
        metrics: dict[str, Any] = {}
        for label, tree, brick in zip(selection.labels, selection.trees, bodies, strict=True):
            card = selection.card_of(tree)
            role = role_of(card)
            cells, figures = row(
                backbone,
                label,
                role,
                [brick],
                tasks,
                heads,
                trainer,
                config["evaluation"],
                seed=config["seed"],
            )
            matrix += cells
            several = len(bodies) > 1
            metrics |= {f"{label}: {k}" if several else k: v for k, v in figures.items()}
        if config["evaluation"]["head_only"]:
            floor = floor_of(backbone, tasks, trainer, config["evaluation"], seed=config["seed"])
            matrix += floor.cells("frozen backbone", "floor")
        same = unchanged(backbone, before, selection.backbone)
        wandb.table("matrix", list(matrix[0]), [list(cell.values()) for cell in matrix])
        wandb.summary({name: figure["value"] for name, figure in metrics.items()})
    card = selection.card_of(selection.trees[0]) if len(selection.trees) == 1 else None
    return {
        "brick": brick_entry(card, selection.library) if card is not None else None,
        **backbone_entries(backbone, same),
        "metrics": metrics,
        "cost": {"peak_memory_bytes": peak_memory()},
        "matrix": matrix,
        "wandb": wandb.as_record(),
    }


def role_of(card: Any) -> str:
    """Which kind of row a brick makes: merged from others, trained on several tasks, or neither."""
    if card is None or card.operation == "merge":
        return "merged"
    return "ceiling" if len(card.heads) > 1 else "brick"
