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
    from cfm_train.data.tasks import HEADED
    from cfm_train.evaluation.matrix import cells_of, figures_of, floor, row
    from cfm_train.evaluation.shelf import Shelf
    from cfm_train.operations.scene import open_scene
    from cfm_train.operations.setting import tracked
    from cfm_train.tracking.comparison_tables import cells

    scene = open_scene(config, inputs, Shelf(None))
    tasks = list(inputs.tasks)
    for name, task in inputs.tasks.items():
        if task.spec.type in HEADED and name not in scene.heads:
            print(f"{name}: no brick brings a head; one is refitted on each brick", flush=True)
    with tracked(config, folder) as wandb:
        rows = [row(scene.scorer, body, tasks, scene.heads) for body in scene.bodies]
        matrix = [cell for scored in rows for cell in cells_of(scored)]
        metrics: dict[str, Any] = {}
        for body, scored in zip(scene.bodies, rows, strict=True):
            start = f"{body.label}: " if len(rows) > 1 else ""
            metrics |= {f"{start}{k}": v for k, v in figures_of(scored).items()}
        if config["evaluation"]["head_only"]:
            matrix += cells_of(floor(scene.scorer, tasks))
        for body in scene.bodies:
            if body.note is not None:
                print(f"{body.label} {body.note}")
        record = scene.record(inputs.selection, folder)
        wandb.table("matrix", *cells(matrix))
        wandb.summary({name: figure["value"] for name, figure in metrics.items()})
    return {**record, "metrics": metrics, "matrix": matrix, "wandb": wandb.as_record()}


def role_of(card: Any) -> str:
    """Which kind of row a brick makes: made from others, trained on several tasks, or neither."""
    if card is None or card.operation in ("merge", "stitch"):
        return "merged"
    return "ceiling" if len(card.heads) > 1 else "brick"
