"""Sample outputs at each validation, for a person to read beside the figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from cfm_train.backbone.load import Backbone
from cfm_train.data.encode import Encoded, TaskData
from cfm_train.data.tasks import GENERATIVE, LABELLED, TaskSpec
from cfm_train.evaluation.evaluator import Answers
from cfm_train.evaluation.generation import answer_texts, prompt_text
from cfm_train.tracking.wandb_run import WandbRun

#: Most of an input that is shown, in characters.
SHOWN = 300


class SampleOutputs(Callback):
    """Keeps a few validation rows with what the brick says to them.

    Args:
        backbone: the backbone with the brick plugged in.
        tasks: the tasks; validation rows are shown, or training rows where there are none.
        count: how many rows of each task.
        wandb: the run's W&B side; each validation logs a table of its own.
    """

    def __init__(
        self, backbone: Backbone, tasks: Mapping[str, TaskData], count: int, wandb: WandbRun
    ) -> None:
        self.backbone = backbone
        self.tasks = tasks
        self.count = count
        self.wandb = wandb
        self.latest: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """The samples of the last validation, for a run that is resumed after its end."""
        return {"latest": self.latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the samples."""
        self.latest = state_dict["latest"]

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Shows the first rows of every task."""
        if trainer.state.fn != "fit":
            return
        answers: dict[str, Answers] = module.answers  # type: ignore[assignment]
        self.latest = [
            sample | {"task": name, "step": trainer.global_step}
            for name, task in self.tasks.items()
            if task.validation is not None
            for sample in show(self.backbone, task.spec, task.validation, answers[name], self.count)
        ]
        if self.latest:
            columns = list(self.latest[0])
            self.wandb.table("samples", columns, [[s[c] for c in columns] for s in self.latest])


def show(
    backbone: Backbone, spec: TaskSpec, encoded: Encoded, answers: Answers, count: int
) -> list[dict[str, Any]]:
    """Input, prediction and reference of the first rows, in words; and whether that is right.

    Only an answer out of a list of labels is right or wrong: a number is near, and a text that goes
    on otherwise than the reference may be as good.
    """
    rows = range(min(count, len(encoded)))
    given = [input_text(encoded.row(i))[:SHOWN] for i in rows]
    if spec.type in GENERATIVE:
        said = answer_texts(backbone, spec, encoded, rows)
        if spec.type == "causal":  # the end of what is to be continued, not the document's top
            given = [prompt_text(backbone, spec, encoded, i)[-SHOWN:] for i in rows]
    else:
        said = [
            (in_words(spec, answers.predictions[i]), in_words(spec, answers.references[i]))
            for i in rows
        ]
    return [
        {
            "input": given[i],
            "prediction": said[i][0],
            "reference": said[i][1],
            "right": said[i][0] == said[i][1] if spec.type in LABELLED else None,
            "at": str(encoded.row(i)["_at"]),
        }
        for i in rows
    ]


def input_text(row: Mapping[str, Any]) -> str:
    """A row's input as one line of text."""
    from cfm_train.data.splits import input_of

    return " ⏐ ".join(input_of(dict(row)))


def in_words(spec: TaskSpec, value: Any) -> str:
    """A prediction as a person reads it: label names instead of numbers."""
    if spec.labels is None:
        return f"{float(value):.4g}"
    if spec.type == "multilabel":
        return ", ".join(n for n, on in zip(spec.labels, value, strict=True) if on) or "none"
    if spec.type == "token":
        return " ".join(spec.labels[int(i)] for i in value)
    return spec.labels[int(value)]
