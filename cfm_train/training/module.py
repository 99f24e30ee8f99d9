"""The Lightning module that trains a brick over a frozen backbone.

One Lightning batch is one optimiser step: a group of micro-batches whose losses are summed and
divided by the group's item count. Accumulation therefore weighs every item alike, and a step
either happened or did not, which is what makes a killed run resume exactly: batch and generators
are functions of seed and step.

The backbone is registered (so that Lightning moves it) but is no part of `state_dict`: a
checkpoint holds the brick, its heads and the optimiser.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.data.tasks import HEADED, TaskSpec
from cfm_train.evaluation.evaluator import Answers
from cfm_train.training.cost import work_of
from cfm_train.training.muon import Muon, hidden_matrices
from cfm_train.training.objectives import (
    BESIDE,
    Batch,
    Learning,
    Result,
    compute,
    count_items,
)
from cfm_train.training.schedule import factor
from cfm_train.training.seeding import reseed


class Diverged(Exception):
    """The loss is no longer a number, or has grown far beyond where it started.

    Attributes:
        rows: task and row number of the step's rows; those with the bad loss where that is told.
    """

    def __init__(self, what: str, rows: list[tuple[str, int]]) -> None:
        super().__init__(what)
        self.rows = rows


@dataclass(frozen=True)
class Optimisation:
    """What the optimiser needs to know; the values come from the recipe's ``trainer`` section.

    Attributes:
        optimizer: ``adamw``, or ``muon`` (see `training.muon`), which takes hidden matrices.
        learning_rate: peak rate, for all but heads.
        head_learning_rate: peak rate for heads. They start from nothing and need larger steps than
            a brick, which starts from what the backbone does.
        weight_decay: decoupled decay.
        clip: largest norm of the gradient, None for no clipping.
        warmup: share of the steps over which the rate rises.
        schedule: see `training.schedule`.
        steps: optimiser steps of the whole run.
        seed: seed of the run.
        diverged: a mean loss over `WINDOW` steps this many times the first window's stops the run.
    """

    optimizer: str
    learning_rate: float
    head_learning_rate: float
    weight_decay: float
    clip: float | None
    warmup: float
    schedule: str
    steps: int
    seed: int
    diverged: float


WINDOW = 20

_Loss = TypeVar("_Loss", float, Tensor)

#: The figure that early stopping and the best checkpoint follow: more is better, for every task.
MONITOR = "validation/monitor"


def monitored(spec: TaskSpec, figures: Mapping[str, float]) -> float:
    """A task's figure to follow: its primary metric, or its loss, turned so that more is better."""
    if spec.metric not in figures:
        return -figures["loss"]
    return figures[spec.metric] if spec.maximize else -figures[spec.metric]


class BrickModule(pl.LightningModule):
    """Trains one brick (and its heads) on one task or several.

    Args:
        backbone: the frozen backbone; the brick is plugged in by `on_fit_start`.
        brick: the brick, built for that backbone.
        specs: the tasks by name; a batch names its task in ``batch["task"]``.
        optimisation: see `Optimisation`.
        learning: what is minimised in place of the task types' own objectives; None for those.
    """

    def __init__(
        self,
        backbone: Backbone,
        brick: Brick,
        specs: Mapping[str, TaskSpec],
        optimisation: Optimisation,
        learning: Learning | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        # Lightning must not ask for the backbone's tensors; `load_state_dict` checks the brick's.
        self.strict_loading = False
        self.backbone = backbone
        self.brick = brick
        self.specs = dict(specs)
        self.answers: dict[str, Answers] = {}
        self.optimisation = optimisation
        self.learning = learning
        self.rows_seen = 0
        self.tokens_seen = 0
        self.flops = 0.0
        self._reading = work_of(backbone, ()).source
        self._work = work_of(backbone, brick.site_names, weights=brick.trains_backbone)
        self.train_seconds = 0.0
        self._since = time.perf_counter()
        self._window: list[float] = []
        self._first_window: float | None = None

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The brick's tensors alone."""
        return {f"brick.{name}": value for name, value in self.brick.state_dict().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Sets the brick's tensors; a missing or unknown one is an error."""
        own = {name.removeprefix("brick."): value for name, value in state_dict.items()}
        return self.brick.load_state_dict(own, strict=True)

    def configure_optimizers(self) -> Any:
        """The optimiser over the brick's parameters, with the schedule applied each step."""
        options = self.optimisation
        named = [(n, p) for n, p in self.brick.named_parameters() if p.requires_grad]
        matrices = hidden_matrices(self.brick) if options.optimizer == "muon" else set()
        hidden = [p for name, p in named if name in matrices]
        heads = [p for name, p in named if name.startswith("heads.")]
        body = [p for n, p in named if n not in matrices and not n.startswith("heads.")]
        # Where heads are all there is, they are the brick, and its rate is theirs.
        rate = options.head_learning_rate if body or hidden else options.learning_rate
        groups: list[dict[str, Any]] = [
            {"params": body, "lr": options.learning_rate},
            {"params": heads, "lr": rate},
        ]
        optimizer: torch.optim.Optimizer
        if options.optimizer == "muon":
            groups.append({"params": hidden, "lr": options.learning_rate, "muon": True})
            groups = [group for group in groups if group["params"]]
            optimizer = Muon(groups, weight_decay=options.weight_decay)
        else:
            groups = [group for group in groups if group["params"]]
            optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: factor(
                step, total=options.steps, warmup=options.warmup, schedule=options.schedule
            ),
        )
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_fit_start(self) -> None:
        """Plugs the brick in; it stays plugged for training and validation."""
        self.backbone.slots.plug([self.brick])

    def on_train_start(self) -> None:
        """Starts the clock of the first step."""
        self._since = time.perf_counter()

    def on_validation_end(self) -> None:
        """Starts the clock again: a step's time is all but the validation before it."""
        self._since = time.perf_counter()

    def loss_of(self, batch: Batch) -> Result:
        """The objective on one micro-batch."""
        if self.learning is not None:
            return self.learning.loss(self.backbone, self.brick, batch, training=self.training)
        task = batch["task"]
        head = self.brick.head_for(task)
        return compute(self.specs[task].type, self.backbone, head, batch)

    def training_step(self, group: list[Batch], batch_idx: int) -> dict[str, Any]:
        """One optimiser step on a group of micro-batches.

        Raises:
            Diverged: the loss or the gradient is not finite, or the loss has grown out of hand.
        """
        step = self.global_step
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        totals = self.totals(group)
        optimizer.zero_grad(set_to_none=True)  # type: ignore[union-attr]
        loss = 0.0
        for micro, batch in enumerate(group):
            reseed(self.optimisation.seed, "step", step, micro)
            result = self.loss_of(batch)
            value = self.share(result.loss.item(), batch, totals)
            if not math.isfinite(value):
                raise Diverged(f"the loss is {value} at step {step + 1}", bad_rows(result, batch))
            loss += value
            self.manual_backward(self.share(result.loss, batch, totals))
        penalty = self.brick.penalty()
        if penalty is not None:  # once a step, whatever the number of micro-batches
            loss += penalty.item()
            self.manual_backward(penalty)
        rate = scheduler.get_last_lr()[0]  # type: ignore[union-attr]
        parameters = [p for p in self.brick.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.optimisation.clip or math.inf).item()
        if not math.isfinite(norm):
            raise Diverged(f"the gradient is {norm} at step {step + 1}", rows_of(group))
        optimizer.step()  # type: ignore[union-attr]
        scheduler.step()  # type: ignore[union-attr]
        self.brick.after_step(step + 1, self.optimisation.steps)
        self._watch(loss, step, group)
        own = [b for b in group if b["task"] != BESIDE]
        rows = sum(len(b["index"]) for b in own)
        tokens = sum(int(b["tokens"]) for b in own)
        self.rows_seen += rows
        self.tokens_seen += tokens
        flops = sum(self._work.of(b["tokens"], b["targets"]) for b in group)
        if self.learning is not None:
            flops += self._reading * sum(self.learning.tokens_read(b) for b in group)
        self.flops += flops
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self.train_seconds += seconds
        return {
            "step": step + 1,
            "train/loss": loss,
            "train/learning_rate": rate,
            "train/gradient_norm": norm,
            "rows": rows,
            "tokens": tokens,
            "flops": flops,
            "seconds": seconds,
        }

    def totals(self, group: list[Batch]) -> dict[bool, int]:
        """How many items a step's loss is divided by: its own, and those of rows beside them."""
        totals = {False: 0, True: 0}
        for batch in group:
            kind = "causal" if self.learning is not None else self.specs[batch["task"]].type
            totals[batch["task"] == BESIDE] += count_items(kind, batch)
        return {beside: max(1, total) for beside, total in totals.items()}

    def share(self, loss: _Loss, batch: Batch, totals: Mapping[bool, int]) -> _Loss:
        """What a micro-batch's summed loss adds to the loss of its step."""
        beside = batch["task"] == BESIDE
        part = loss / totals[beside]
        return part * self.learning.weight if beside and self.learning is not None else part

    def _watch(self, loss: float, step: int, group: list[Batch]) -> None:
        self._window.append(loss)
        if len(self._window) < WINDOW:
            return
        mean = sum(self._window) / WINDOW
        self._window.clear()
        if self._first_window is None:
            self._first_window = mean
        elif mean > self.optimisation.diverged * max(self._first_window, 1e-3):
            raise Diverged(
                f"the loss grew from {self._first_window:.4g} to {mean:.4g} by step {step + 1}",
                rows_of(group),
            )

    def on_validation_epoch_start(self) -> None:
        """Starts with no answers."""
        self.answers = {name: Answers(spec) for name, spec in self.specs.items()}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collects one batch's answers."""
        self.answers[batch["task"]].add(batch, self.loss_of(batch))

    def on_validation_epoch_end(self) -> None:
        """Logs each task's figures, and `MONITOR`, which chooses the best brick."""
        chosen = []
        for name, answers in self.answers.items():
            if not answers.losses:
                continue
            prefix = "validation" if len(self.specs) == 1 else f"validation/{name}"
            figures = {"loss": answers.loss()}
            if self.specs[name].type in HEADED:
                scores = answers.scores(bootstrap=0, seed=self.optimisation.seed)
                figures |= {metric: s.value for metric, s in scores.items()}
            for metric, value in figures.items():
                self.log(f"{prefix}/{metric}", value, batch_size=1)
            chosen.append(monitored(self.specs[name], figures))
        if chosen:
            self.log(MONITOR, sum(chosen) / len(chosen), batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what is not a tensor: counters and the divergence watch."""
        checkpoint["cfm"] = {
            "rows": self.rows_seen,
            "tokens": self.tokens_seen,
            "flops": self.flops,
            "train_seconds": self.train_seconds,
            "window": list(self._window),
            "first_window": self._first_window,
            "learning_rate": self.optimisation.learning_rate,
            "stopped": self.trainer.should_stop,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up the counters where the checkpoint left them."""
        kept = checkpoint["cfm"]
        self.rows_seen, self.tokens_seen = kept["rows"], kept["tokens"]
        self.flops = kept["flops"]
        self.train_seconds = kept["train_seconds"]
        self._window, self._first_window = list(kept["window"]), kept["first_window"]

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Moves the tensors of a group or of one batch; task names and row numbers stay."""
        if isinstance(batch, list):
            return [self.transfer_batch_to_device(b, device, dataloader_idx) for b in batch]
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def rows_of(group: list[Batch]) -> list[tuple[str, int]]:
    """Task and number of every row of a step."""
    return [(batch["task"], i) for batch in group for i in batch["index"].tolist()]


def bad_rows(result: Result, batch: Batch) -> list[tuple[str, int]]:
    """Task and number of the rows whose own loss is not finite; of all where each one's is."""
    bad = ~torch.isfinite(result.row_loss)
    index = batch["index"][bad] if bool(bad.any()) else batch["index"]
    return [(batch["task"], i) for i in index.tolist()]
