"""Making a brick that is not trained: what a run does in place of `fit`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.data.encode import TaskData
from cfm_train.tracking.metrics_file import MetricsFile
from cfm_train.tracking.wandb_run import WandbRun
from cfm_train.training.fit import Fitted


def derive(
    backbone: Backbone,
    brick: Brick,
    tasks: Mapping[str, TaskData],
    seed: int,
    metrics: MetricsFile,
    wandb: WandbRun,
) -> Fitted:
    """Makes the brick from data, and writes down what was tried: one row of metrics for each.

    A run that was killed begins anew and comes to the same: the seed decides all that is drawn.

    Args:
        backbone: the backbone, nothing plugged.
        brick: a brick of a kind with ``trains = False``.
        tasks: the tasks by name.
        seed: the run's.
        metrics: the run's metrics file.
        wandb: the run's W&B side.
    """
    started = time.perf_counter()
    derived = brick.fit_without_training(backbone, tasks, seed)
    seconds = time.perf_counter() - started
    for step, (name, loss) in enumerate(derived.scores.items()):
        values: dict[str, Any] = {"validation/loss": loss, "tried": name}
        metrics.append(step, values)
        wandb.log(step, values)
    brick.eval()
    return Fitted(
        steps=0,
        best_step=0,
        learning_rate=0.0,
        rows=derived.rows,
        tokens=derived.tokens,
        train_seconds=seconds,
        flop_share=None,  # the time is mostly that of trying layers, not of reading
        stopped="finished",
    )
