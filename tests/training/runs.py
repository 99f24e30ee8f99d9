"""Training in this process, from a brick section to what `fit` returns; and how to break it off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.kinds import make_brick
from cfm_train.config.compose import option
from cfm_train.data.encode import TaskData
from cfm_train.operations.train import add_heads
from cfm_train.tracking.metrics_file import MetricsFile
from cfm_train.tracking.wandb_run import WandbRun
from cfm_train.training.checkpoint import read_position
from cfm_train.training.fit import Fitted, fit
from cfm_train.training.objectives import Learning
from cfm_train.training.seeding import reseed
from tests.tasks import TRAINER


class BrokenOff(Exception):
    """The run is to end here."""


class BreakOff(Callback):
    """Ends a run in the middle of the work after a step, as a kill would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Raises before the step that follows."""
        if trainer.global_step >= self.after:
            raise BrokenOff


def new_brick(
    backbone: Backbone, tasks: Mapping[str, TaskData], option_name: str, seed: int = 0, **hyper: Any
) -> Brick:
    """A new brick with heads, as `operations.train` makes it."""
    section = {**option("brick", option_name), **hyper}
    section.pop("learning_rate")
    reseed(seed, "brick")
    brick = make_brick(section).build(backbone)
    add_heads(brick, backbone, dict(tasks), seed)
    return brick


def train(
    backbone: Backbone,
    brick: Brick,
    tasks: Mapping[str, TaskData],
    folder: Path,
    *,
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    learning: Learning | None = None,
    **settings: Any,
) -> Fitted:
    """Trains the brick in a run folder, going on from a checkpoint where there is one."""
    folder.mkdir(exist_ok=True)
    position = read_position(folder / "checkpoints")
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.cut_back(position.step)
    return fit(
        backbone,
        brick,
        tasks,
        {**TRAINER, **settings},
        seed=seed,
        mixture=1.0,
        folder=folder,
        position=position,
        metrics=metrics,
        wandb=WandbRun("disabled", "p", None, "train", [], {}, folder),
        callbacks=list(callbacks),
        learning=learning,
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    """The run's rows of metrics."""
    return MetricsFile(folder / "metrics.jsonl").rows()
