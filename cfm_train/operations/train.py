"""Train a brick on a task, judge it on the test split, and put it into the library.

check    backbone, data, library, all before torch is imported
run      load ─► build ─► fit ─► test (and the lower bound) ─► store ─► record
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.backbone.fingerprint import fingerprint, tokenizer_hash
from cfm_train.backbone.spec import ResolvedBackbone, resolve
from cfm_train.data.sources import Checked, check_all, data_fingerprints
from cfm_train.errors import UserError
from cfm_train.library.card import check_name
from cfm_train.library.store import Library
from cfm_train.operations import trained
from cfm_train.tracking.comparison_tables import cells
from cfm_train.tracking.wandb_setting import resolve_mode

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.bricks.brick import Brick
    from cfm_train.data.encode import TaskData


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        backbone: the backbone's folder and config.
        tasks: the tasks with all their rows.
        library: where the brick will go.
        fingerprints: content hashes for the config hash.
    """

    backbone: ResolvedBackbone
    tasks: dict[str, Checked]
    library: Library
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Checks everything that a training run needs, without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_name(config["name"])
    resolve_mode(config["tracking"]["mode"])
    trained.check_kind(config["brick"]["kind"])
    backbone = resolve(config["backbone"])
    tasks = {task.spec.name: task for task in check_all(config["data"])}
    library = Library(config["library"])
    library.check_writable()
    fingerprints = {"backbone": fingerprint(backbone.folder)} | data_fingerprints(tasks)
    return Inputs(backbone, tasks, library, fingerprints)


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Trains, evaluates and stores; returns the record's own part.

    Raises:
        RuntimeError: training diverged; the message names step and rows.
    """
    from cfm_train.bricks.kinds import make_brick
    from cfm_train.bricks.stored import store
    from cfm_train.evaluation.floor import floor_of
    from cfm_train.evaluation.judge import judge, probe
    from cfm_train.operations.setting import open_backbone, tracked, unchanged
    from cfm_train.tracking.metrics_file import MetricsFile
    from cfm_train.training.checkpoint import read_position
    from cfm_train.training.derive import derive
    from cfm_train.training.fit import fit
    from cfm_train.training.module import Diverged
    from cfm_train.training.samples import SampleOutputs
    from cfm_train.training.seeding import reseed

    settings = config["trainer"]
    backbone, before = open_backbone(inputs.backbone, config["backbone"], settings)
    tasks = _encode(inputs, backbone)
    for name, task in inputs.tasks.items():
        print(trained.rows_line(task, tasks[name]), flush=True)
        if line := trained.turns_line(task, backbone.tokenizer):
            print(line, flush=True)
    bare = probe(backbone, tasks)
    reseed(config["seed"], "brick")
    brick = make_brick(config["brick"]).build(backbone)
    add_heads(brick, backbone, tasks, config["seed"])
    if brick.trains and not brick.parameter_count():
        raise UserError(
            f"A brick of kind {brick.kind} has nothing to train on a task that the language model "
            "answers itself: choose brick=lora, or a task with labels."
        )

    position = read_position(folder / "checkpoints")
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.cut_back(position.step)
    with tracked(config, folder) as wandb:
        samples = SampleOutputs(backbone, tasks, settings["samples"], wandb)
        try:
            if brick.trains:
                fitted = fit(
                    backbone,
                    brick,
                    tasks,
                    settings,
                    seed=config["seed"],
                    mixture=config["data"]["mixture"],
                    folder=folder,
                    position=position,
                    metrics=metrics,
                    wandb=wandb,
                    callbacks=[samples] if settings["samples"] else [],
                )
            else:
                fitted = derive(backbone, brick, tasks, config["seed"], metrics, wandb)
        except Diverged as error:
            raise RuntimeError(trained.where(error, tasks)) from None
        judged = judge(backbone, brick, tasks, config["evaluation"], seed=config["seed"], bare=bare)
        floor = None
        if config["evaluation"]["head_only"]:
            floor = floor_of(backbone, tasks, settings, config["evaluation"], seed=config["seed"])
        same = unchanged(backbone, before, inputs.backbone)
        card = store(
            brick,
            inputs.library,
            backbone,
            name=config["name"],
            operation="train",
            tokenizer=tokenizer_hash(inputs.backbone.folder),
            recipe=config,
            data=[
                {"name": n, "fingerprint": fp, "licence": None}
                for n, task in inputs.tasks.items()
                for fp in [task.fingerprints["train"]]
            ],
            metrics=judged.figures(),
            run=folder.name,
        )
        record = trained.record_of(
            inputs.tasks, inputs.library, card, brick, backbone, fitted, judged, floor, same
        )
        matrix = judged.cells(config["name"], "brick")
        record |= trained.keep_examples(
            matrix, judged, brick, card, inputs.tasks, tasks, backbone, folder
        )
        if floor is not None:
            matrix += floor.cells("frozen backbone", "floor")
        record |= {"matrix": matrix, "samples": samples.latest}
        if matrix:
            wandb.table("matrix", *cells(matrix))
        wandb.artifact(card.name, "brick", inputs.library.folder(card), {"version": card.version})
        wandb.summary({name: figure["value"] for name, figure in record["metrics"].items()})
    return {**record, "wandb": wandb.as_record()}


def add_heads(brick: Brick, backbone: Backbone, tasks: dict[str, TaskData], seed: int) -> None:
    """Gives the brick a head for each task that needs one."""
    from cfm_train.data.tasks import HEADED
    from cfm_train.training.task_head import new_head

    for name, task in tasks.items():
        if task.spec.type in HEADED:
            brick.add_head(name, new_head(backbone, task, seed))


def _encode(inputs: Inputs, backbone: Backbone) -> dict[str, TaskData]:
    from cfm_train.data.encode import encode
    from cfm_train.paths import cache_dir

    return {n: encode(t, backbone.tokenizer, cache_dir()) for n, t in inputs.tasks.items()}


def rehearse(config: dict[str, Any], inputs: Inputs) -> None:
    """Loads the backbone and builds the brick for it, as ``dry_run`` wants to know.

    Raises:
        UserError: the brick does not fit the backbone.
    """
    from cfm_train.bricks.kinds import make_brick
    from cfm_train.operations.setting import open_backbone

    for task in inputs.tasks.values():
        print(trained.rows_line(task))
    backbone, _ = open_backbone(inputs.backbone, config["backbone"], config["trainer"])
    make_brick(config["brick"]).build(backbone)
