"""Weights along a pretraining, each a model folder of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class Snapshots(Callback):
    """Writes the model after some steps, before the checkpoint of that step.

    A run that was killed in between does the step again and writes the same weights once more.

    Args:
        steps: after which steps; 0 for before the first.
        folder: where ``step-N`` folders go.
        write: writes the model as it stands into a folder.
    """

    def __init__(self, steps: Collection[int], folder: Path, write: Callable[[Path], None]) -> None:
        self.steps, self.folder, self.write = set(steps), folder, write

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The weights before training.

        Raises:
            RuntimeError: training ends before one of the steps.
        """
        if self.steps and max(self.steps) > trainer.max_steps:
            raise RuntimeError(
                f"snapshots: there is no step {max(self.steps)} in {trainer.max_steps} steps: "
                "leave it out, or train for longer."
            )
        if trainer.global_step == 0:
            self._keep(0)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """The weights after a step."""
        self._keep(trainer.global_step)

    def _keep(self, step: int) -> None:
        if step in self.steps:
            folder = self.folder / f"step-{step}"
            shutil.rmtree(folder, ignore_errors=True)
            self.write(folder)
