"""Put bricks and configurations side by side: which wins, by how much, and why.

check    the rows: what is named, and the bricks that it is made of, as their bounds; no torch
run      matrix with bounds ─► choice on validation ─► averages and margins ─► second table,
         similarity, order effects, forgetting, costs ─► record, dashboard, W&B

Weights, λ and density are never chosen on test rows: of configurations that differ in these alone,
the one that is best on the validation rows of its bricks' tasks competes, and the others are points
of a curve. What an earlier record holds is not asked again (`evaluation.shelf`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.configuration.expression import BrickRef, Expression, bricks
from cfm_train.configuration.variants import opened
from cfm_train.data.sources import Checked
from cfm_train.errors import UserError
from cfm_train.operations import evaluate
from cfm_train.operations.selection import Selection, own_sections, select


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        selection: the rows; bricks that those named are made of come last.
        trees: each row's configuration, merged bricks written out, by label.
        tasks: the tasks with all their rows.
        owners: the tasks that each trained brick is made for, by reference.
        fingerprints: content hashes for the config hash.
    """

    selection: Selection
    trees: dict[str, Expression]
    tasks: dict[str, Checked]
    owners: dict[str, list[str]]
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Finds bricks, those that they are made of, backbone and tasks, without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    named = select(config)
    trees = [opened(tree, named.library) for tree in named.trees]
    rows = {str(tree) for tree in [*trees, *named.trees]}
    parts = dict.fromkeys(ref for tree in trees for ref in bricks(tree) if str(ref) not in rows)
    more = [_as_written(ref, named) for ref in parts]
    found = evaluate.check({**config, "bricks": [*config["bricks"], *more]})
    for name, task in found.tasks.items():
        if not task.rows.get("test"):
            raise UserError(
                f"The task '{name}' has no test split: give data.test, or leave it out."
            )
    selection = found.selection
    return Inputs(
        selection,
        {
            label: opened(tree, selection.library)
            for label, tree in zip(selection.labels, selection.trees, strict=True)
        },
        found.tasks,
        {
            str(ref): list(dict.fromkeys([*card.heads, *own_sections([card])]))
            for ref, card in selection.cards.items()
        },
        found.fingerprints,
    )


def _as_written(ref: BrickRef, selection: Selection) -> str:
    """A pinned brick by its name alone, where that means this version."""
    newest = selection.library.versions(ref.name)[-1] == ref.version
    return ref.name if newest else str(ref)


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Compares; returns the record's own part, with the records to draw it with."""
    from cfm_train.evaluation.matrix import cells_of, figures_of, floor, refitted, row
    from cfm_train.evaluation.scorer import BARE
    from cfm_train.evaluation.shelf import Shelf
    from cfm_train.operations.compared import Compared
    from cfm_train.operations.scene import open_scene
    from cfm_train.operations.setting import tracked
    from cfm_train.tracking.comparison_tables import send

    runs = Path(config["outputs"]).absolute() / "runs"
    scene = open_scene(config, inputs, Shelf(runs if config["reuse"] else None))  # type: ignore[arg-type]
    scorer, tasks = scene.scorer, list(inputs.tasks)
    made_by = {card.run for card in inputs.selection.cards.values()}
    drawn_with = sorted(p for p in runs.glob("*/*/record.json") if p.parent.name in made_by)
    with tracked(config, folder) as wandb:
        rows = {body.label: row(scorer, body, tasks, scene.heads) for body in scene.bodies}
        if config["evaluation"]["head_only"]:
            rows[BARE.label] = floor(scorer, tasks)
        compared = Compared(scene, inputs, rows, drawn_with)
        comparison = compared.comparison()
        second = []
        if config["refit"]:
            for body in compared.shown():
                second += refitted(scorer, body, tasks)
        comparison["reused"] = {"found": scorer.found, "made": scorer.made}
        record = scene.record(inputs.selection, folder)
        matrix = [cell for scored in rows.values() for cell in cells_of(scored, mark=False)]
        again = [one.cell() for one in second]
        metrics = {
            f"{label}: {key}": figure
            for label, scored in rows.items()
            if label != BARE.label
            for key, figure in figures_of(scored).items()
        }
        send(wandb, matrix, again, comparison)
        wandb.summary({name: figure["value"] for name, figure in metrics.items()})
    for line in compared.lines(comparison):
        print(line)
    return {
        **record,
        "metrics": metrics,
        "matrix": matrix,
        **({"refitted": again} if again else {}),
        "comparison": comparison,
        "wandb": wandb.as_record(),
        "drawn_with": [str(path) for path in drawn_with],
    }
