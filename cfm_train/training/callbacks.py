"""What a person follows while a brick trains: the metrics file, W&B, and the progress bar."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from tqdm import tqdm

from cfm_train.tracking.metrics_file import MetricsFile
from cfm_train.tracking.wandb_run import WandbRun
from cfm_train.training.cost import peak_memory


class MetricsLog(Callback):
    """Writes every step and every validation to ``metrics.jsonl`` and to W&B.

    Args:
        file: the run's metrics file.
        wandb: the run's W&B side.
    """

    def __init__(self, file: MetricsFile, wandb: WandbRun) -> None:
        self.file = file
        self.wandb = wandb

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs the step's loss, learning rate and gradient norm."""
        values = {name: outputs[name] for name in outputs if name.startswith("train/")}
        self._log(outputs["step"], values)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Logs the validation's figures."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        values = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("validation/")
        }
        self._log(trainer.global_step, values)

    def _log(self, step: int, values: dict[str, float]) -> None:
        self.file.append(step, values)
        self.wandb.log(step, values)


#: Terminals narrower than this get the bar's figures in short: tqdm cuts off what does not fit.
WIDE = 100


class Progress(Callback):
    """A bar over optimiser steps: loss, samples/s, tokens/s, share of the FLOP limit, memory.

    Args:
        steps: optimiser steps of the run.
        peak_flops: what this machine multiplies at best, FLOP/s.
    """

    def __init__(self, steps: int, peak_flops: float) -> None:
        self.steps = steps
        self.peak_flops = peak_flops
        self._bar: Any = None
        self._recent: deque[tuple[float, int, int, float]] = deque(maxlen=20)
        self._shown = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Opens the bar where the run stands."""
        self._bar = tqdm(
            total=self.steps,
            initial=trainer.global_step,
            file=sys.stderr,
            mininterval=1.0 if sys.stderr.isatty() else 30.0,
            dynamic_ncols=True,
            leave=True,
            bar_format="{n_fmt}/{total_fmt}|{bar}| {remaining}{postfix}",
        )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Moves the bar; the figures are means over the last steps."""
        names = ("seconds", "rows", "tokens", "flops")
        self._recent.append(tuple(outputs[name] for name in names))
        if time.perf_counter() - self._shown > 0.5:
            self._shown = time.perf_counter()
            seconds, rows, tokens, flops = map(sum, zip(*self._recent, strict=True))
            narrow = (self._bar.format_dict["ncols"] or WIDE) < WIDE
            limit = "FLOP" if narrow else "of the FLOP limit"
            self._bar.set_postfix_str(
                f"loss {outputs['train/loss']:.3f}, "
                f"{rows / seconds:.0f} samples/s, "
                f"{tokens / seconds:.0f} tokens/s, "
                f"{flops / seconds / self.peak_flops:.0%} {limit}, "
                f"{peak_memory() / 2**30:.1f} GiB",
                refresh=False,
            )
        self._bar.update(1)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Closes the bar."""
        self._bar.close()

    def on_exception(
        self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Closes the bar, so that the error starts on a line of its own."""
        if self._bar is not None:
            self._bar.close()
