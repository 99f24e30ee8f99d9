"""Training a brick: the one place where Lightning's Trainer is set up, started and resumed."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.data.batches import BatchStream
from cfm_train.data.encode import TaskData
from cfm_train.tracking.metrics_file import MetricsFile
from cfm_train.tracking.wandb_run import WandbRun
from cfm_train.training.callbacks import MetricsLog, Progress
from cfm_train.training.checkpoint import AtomicCheckpointIO, ExactCheckpoint, Position
from cfm_train.training.cost import peak_flops, peak_memory
from cfm_train.training.dataset import (
    Beside,
    EvaluationDataset,
    StepDataset,
    evaluation_tokens,
    plan_steps,
)
from cfm_train.training.lr_finder import find_learning_rate
from cfm_train.training.module import MONITOR, BrickModule, Optimisation
from cfm_train.training.objectives import BESIDE, Learning


@dataclass(frozen=True)
class Fitted:
    """What training leaves behind.

    Attributes:
        steps: optimiser steps done.
        best_step: the step whose brick was kept; equal to ``steps`` without validation.
        learning_rate: the peak rate that was used.
        rows, tokens: how much was trained on (real tokens, padding left out); what a teacher reads
            and rows beside those of the tasks are none of it, though they take time.
        train_seconds: time from batch to batch, all but start-up and validation.
        flop_share: achieved share of the FLOP limit, see `training.cost`; None where none is known.
        stopped: why training ended: ``finished`` or ``early``.
    """

    steps: int
    best_step: int
    learning_rate: float
    rows: int
    tokens: int
    train_seconds: float
    flop_share: float | None
    stopped: str

    def cost(self, trained: int) -> dict[str, Any]:
        """What a record says of the cost.

        Args:
            trained: how many numbers were trained.
        """
        seconds = max(self.train_seconds, 1e-9)
        return {
            "train_seconds": self.train_seconds,
            "samples_per_second": self.rows / seconds,
            "tokens_per_second": self.tokens / seconds,
            "peak_memory_bytes": peak_memory(),
            "trainable_parameters": trained,
            "flop_share": self.flop_share,
        }


def fit(
    backbone: Backbone,
    brick: Brick,
    tasks: Mapping[str, TaskData],
    settings: Mapping[str, Any],
    *,
    seed: int,
    mixture: float,
    folder: Path,
    position: Position,
    metrics: MetricsFile,
    wandb: WandbRun,
    callbacks: list[Callback] | None = None,
    mixed: bool = False,
    keep_last: bool = False,
    learning: Learning | None = None,
) -> Fitted:
    """Trains a brick, or goes on where a killed run left off, and puts its best state into it.

    Args:
        backbone: the frozen backbone.
        brick: the brick with its heads, built for the backbone.
        tasks: the tasks by name.
        settings: the ``trainer`` section of the recipe.
        seed: decides batches, dropout and initial values.
        mixture: share of each task ~ rows ** mixture, where there are several.
        folder: the run folder; checkpoints go to ``checkpoints/``.
        position: where the run stands, see `checkpoint.read_position`.
        metrics: the run's metrics file, already cut back to that position.
        wandb: the run's W&B side.
        callbacks: more Lightning callbacks.
        mixed: whether matrix products are done in bfloat16 while weights stay in float32.
        keep_last: whether the last step is kept, whatever validation says of it.
        learning: what is minimised in place of the task types' own objectives.

    Raises:
        Diverged: see `BrickModule.training_step`.
    """
    splits = {name: task.train for name, task in tasks.items()}
    stream = BatchStream(
        {name: split.lengths for name, split in splits.items()},
        tokens_per_batch=settings["tokens_per_batch"],
        rows_per_batch=settings["rows_per_batch"],
        seed=seed,
        mixture=mixture,
    )
    total, every = plan_steps(stream, settings)
    pad_id = backbone.tokenizer.pad_token_id
    beside = None if learning is None else _beside(learning, settings, seed)
    dataset = StepDataset(stream, splits, settings["accumulate"], pad_id, beside)
    validation = {name: task.validation for name, task in tasks.items() if task.validation}
    options = Optimisation(
        optimizer=settings["optimizer"],
        learning_rate=settings["learning_rate"],
        head_learning_rate=settings["head_learning_rate"],
        weight_decay=settings["weight_decay"],
        clip=settings["clip"] or None,
        warmup=settings["warmup"],
        schedule=settings["schedule"],
        steps=total,
        seed=seed,
        diverged=settings["divergence"],
    )
    specs = {name: task.spec for name, task in tasks.items()}
    checkpoint = ExactCheckpoint(
        folder / "checkpoints",
        every=settings["checkpoint_every"] or every,
        monitor=MONITOR if validation and not keep_last else None,
        maximize=True,
    )
    if position.learning_rate is not None:
        options = replace(options, learning_rate=position.learning_rate)
    elif settings["find_learning_rate"]:
        module = BrickModule(backbone, brick, specs, options, learning)
        options = replace(options, learning_rate=find_learning_rate(module, dataset, folder))
    module = BrickModule(backbone, brick, specs, options, learning)
    dataset.start = position.step

    peak = peak_flops(torch.bfloat16 if mixed else backbone.dtype, backbone.device)
    watchers: list[Callback] = [MetricsLog(metrics, wandb), Progress(total, peak)]
    if settings["patience"] and validation:
        watchers.append(EarlyStopping(MONITOR, patience=settings["patience"], mode="max"))
    # The checkpoint comes last, so that it holds what the other callbacks know of this step.
    watchers += [*(callbacks or []), checkpoint]
    trainer = _trainer(backbone, total, every, watchers, settings, folder, bool(validation), mixed)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=None, collate_fn=_as_is)
    evaluation = DataLoader(
        EvaluationDataset(validation, evaluation_tokens(backbone.device), pad_id),
        batch_size=None,
        collate_fn=_as_is,
    )
    if position.step < total and not position.stopped:
        try:
            trainer.fit(
                module,
                loader,
                evaluation if validation else None,
                ckpt_path=str(checkpoint.last_path) if position.step else None,
                weights_only=True,
            )
        except SIGTERMException:  # saved as of this step
            raise SystemExit(128 + signal.SIGTERM) from None
        steps = trainer.global_step
    else:  # killed after the last step: nothing is left to train
        state = torch.load(checkpoint.last_path, map_location="cpu", weights_only=True)
        module.on_load_checkpoint(state)
        module.load_state_dict(state["state_dict"])
        for watcher in watchers:
            if watcher.state_key in state["callbacks"]:
                watcher.load_state_dict(state["callbacks"][watcher.state_key])
        steps = position.step
    best = checkpoint.load_best(brick) or steps
    backbone.slots.unplug()
    brick.eval()
    return Fitted(
        steps=steps,
        best_step=best,
        learning_rate=options.learning_rate,
        rows=module.rows_seen,
        tokens=module.tokens_seen,
        train_seconds=module.train_seconds,
        flop_share=module.flops / max(module.train_seconds, 1e-9) / peak,
        stopped="early" if steps < total else "finished",
    )


def _trainer(
    backbone: Backbone,
    total: int,
    every: int,
    callbacks: list[Callback],
    settings: Mapping[str, Any],
    folder: Path,
    validates: bool,
    mixed: bool,
) -> pl.Trainer:
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Lightning's advice is about data loaders with workers; ours only gathers numbers in memory.
    warnings.filterwarnings("ignore", module=r"pytorch_lightning.*")
    return pl.Trainer(
        accelerator="gpu" if backbone.device.type == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if mixed else "32-true",
        max_steps=total,
        max_epochs=-1,
        val_check_interval=every if validates else None,
        check_val_every_n_epoch=None,
        limit_val_batches=None if validates else 0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        deterministic=settings["deterministic"],
        default_root_dir=str(folder),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _beside(learning: Learning, settings: Mapping[str, Any], seed: int) -> Beside | None:
    """The batches that come beside those of the tasks."""
    if learning.beside is None:
        return None
    stream = BatchStream(
        {BESIDE: learning.beside.lengths},
        tokens_per_batch=settings["tokens_per_batch"],
        rows_per_batch=settings["rows_per_batch"],
        seed=seed,
    )
    return Beside(stream, learning.beside)


def _as_is(batch: Any) -> Any:
    """Batches come collated."""
    return batch
