"""Checkpoints that survive a kill at any moment, and the resume that follows.

Lightning's own save goes through the system's temporary folder and is not atomic across file
systems; ours writes beside the target, flushes to disk and renames. A checkpoint is taken after
the optimiser step and after the validation that belongs to it, so a resumed run neither repeats
nor skips one. Where SIGTERM breaks a validation off, the state is that of the step before, with a
note that its validation is still to come: the resumed run begins with it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.utilities.exceptions import SIGTERMException

from cfm_train.bricks.brick import Brick

LAST = "last.ckpt"
BEST = "best.pt"


def save_atomically(value: Any, path: Path) -> None:
    """``torch.save`` that leaves either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@dataclass(frozen=True)
class Position:
    """Where a run stands when it starts.

    Attributes:
        step: optimiser steps that its checkpoint holds; 0 for a fresh run.
        learning_rate: the peak rate it trains with, None for a fresh run.
        stopped: whether early stopping had ended the training.
    """

    step: int
    learning_rate: float | None
    stopped: bool


def read_position(folder: Path) -> Position:
    """Where the run with this ``checkpoints`` folder stands."""
    path = folder / LAST
    if not path.is_file():
        return Position(0, None, False)
    state = torch.load(path, map_location="cpu", weights_only=True)
    kept = state["cfm"]
    return Position(state["global_step"], kept["learning_rate"], kept["stopped"])


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's door to the disk: atomic writes, reads with ``weights_only=True``."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint atomically."""
        save_atomically(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint; never anything but tensors and plain values."""
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Deletes a checkpoint."""
        Path(path).unlink(missing_ok=True)


class ExactCheckpoint(Callback):
    """Saves the last state after every N steps (and their validation) and on SIGTERM, and the best
    brick.

    Args:
        folder: the run's ``checkpoints`` folder.
        every: optimiser steps between checkpoints.
        monitor: name of the figure that chooses the best brick, such as ``validation/accuracy``.
        maximize: whether more of it is better.
    """

    def __init__(self, folder: Path, every: int, monitor: str | None, maximize: bool) -> None:
        self.folder = folder
        self.every = every
        self.monitor = monitor
        self.maximize = maximize
        self.best: float | None = None
        self.best_step = 0
        self._due = False
        self._broken_off = False

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Sweeps away what a kill in the middle of a write left (the run's lock is ours)."""
        for litter in self.folder.glob(".*.tmp"):
            litter.unlink(missing_ok=True)

    @property
    def last_path(self) -> Path:
        """Where the last state is kept."""
        return self.folder / LAST

    def state_dict(self) -> dict[str, Any]:
        """The best figure so far and its step."""
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the best figure."""
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Saves now, or after the validation that this step brings."""
        step = trainer.global_step
        last = step >= trainer.max_steps
        if last:  # so that Lightning validates once more, wherever the last interval began
            trainer.should_stop = True
        self._due = last or step % self.every == 0 or trainer.received_sigterm
        if self._due and not _validation_follows(trainer, batch_idx):
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keeps the brick if it is the best so far, then saves the state if that is due."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        if value is not None:
            figure = float(value)
            better = self.best is None or (
                figure > self.best if self.maximize else figure < self.best
            )
            if better:
                self.best, self.best_step = figure, trainer.global_step
                brick: Brick = module.brick  # type: ignore[assignment]
                save_atomically(
                    {k: v.detach().cpu() for k, v in brick.state_dict().items()}, self.folder / BEST
                )
        if self._due or trainer.received_sigterm:
            self._save(trainer)

    def on_exception(
        self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Saves the step before a validation that SIGTERM broke off.

        Not that of the last step: with no step left Lightning would not come back to its
        validation, so the checkpoint before it stands.
        """
        left = trainer.global_step < trainer.max_steps
        if isinstance(exception, SIGTERMException) and trainer.validating and left:
            self._broken_off = True
            self._save(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Notes a validation that was broken off as one that has begun with no batch done."""
        if self._broken_off:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            none: dict[str, Any] = dict.fromkeys(("ready", "started", "processed", "completed"), 0)
            progress.update(total={**none, "ready": 1, "started": 1}, current=none)

    def load_best(self, brick: Brick) -> int:
        """Puts the best brick's tensors back and returns its step (0: none was kept)."""
        if self.best is not None:
            tensors = torch.load(self.folder / BEST, map_location="cpu", weights_only=True)
            brick.load_state_dict(tensors)
        return self.best_step

    def _save(self, trainer: pl.Trainer) -> None:
        self._due = False
        trainer.save_checkpoint(self.last_path)


def _validation_follows(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether Lightning validates right after this batch."""
    interval = trainer.val_check_interval
    if not trainer.enable_validation or interval is None:
        return False
    return trainer.should_stop or (batch_idx + 1) % interval == 0
