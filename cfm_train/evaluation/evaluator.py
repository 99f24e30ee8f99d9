"""Predictions of whatever is plugged into a backbone, and their scores.

One collector serves validation during training, the final test and `recipe=evaluate/tasks`:
batches come in any order, predictions are put back into the order of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.heads import Head
from cfm_train.data.encode import Encoded
from cfm_train.data.tasks import IGNORED, TaskSpec
from cfm_train.evaluation.contributions import contributions
from cfm_train.evaluation.examples import Examples
from cfm_train.evaluation.intervals import Score
from cfm_train.training.dataset import EvaluationDataset, evaluation_tokens
from cfm_train.training.objectives import Batch, Result, compute


@dataclass
class Answers:
    """Predictions of one task, row by row.

    Attributes:
        spec: the task.
        predictions: row number -> prediction (class id, 0/1 vector, number, ids, or nats).
        references: row number -> what is right, in the same form (token count for language tasks).
        losses: row number -> (sum of the loss, number of items).
        texts: (said, right) for each row where the task is to write text, else None.
    """

    spec: TaskSpec
    predictions: dict[int, Any] = field(default_factory=dict)
    references: dict[int, Any] = field(default_factory=dict)
    losses: dict[int, tuple[float, int]] = field(default_factory=dict)
    texts: list[tuple[str, str]] | None = None

    def add(self, batch: Batch, result: Result) -> None:
        """Takes in one batch's result."""
        index = batch["index"].tolist()
        counts = result.row_count.tolist()
        for i, loss, count in zip(index, result.row_loss.tolist(), counts, strict=True):
            self.losses[i] = (loss, count)
        predicted, right = _answers(self.spec.type, batch, result)
        self.predictions.update(zip(index, predicted, strict=True))
        self.references.update(zip(index, right, strict=True))

    def loss(self) -> float:
        """Mean loss per item (row or token)."""
        total = sum(count for _, count in self.losses.values())
        return sum(loss for loss, _ in self.losses.values()) / max(1, total)

    def examples(self) -> Examples:
        """What each row adds to the task's metrics; of written answers their likelihood as well."""
        order = sorted(self.predictions)
        predicted = [self.predictions[i] for i in order]
        right = [self.references[i] for i in order]
        if self.spec.type != "token":
            predicted, right = np.asarray(predicted), np.asarray(right)  # type: ignore[assignment]
        # What a model writes is scored by its texts; here it is how likely the right ones are.
        kind = "instruct" if self.spec.type == "seq2seq" else self.spec.type
        labels = self.spec.labels
        parts = {kind: contributions(kind, predicted, right, labels=labels)}
        if self.texts is not None:
            said, wanted = zip(*self.texts, strict=True)
            parts = {"seq2seq": contributions("seq2seq", said, wanted), **parts}
        return Examples(parts, labels)

    def scores(self, *, bootstrap: int, seed: int) -> dict[str, Score]:
        """The task type's metrics with their intervals."""
        return self.examples().scores(bootstrap=bootstrap, seed=seed)


def _answers(task_type: str, batch: Batch, result: Result) -> tuple[list[Any], list[Any]]:
    """Predictions and references of one batch, one for each row."""
    labels = batch["labels"].cpu()
    if task_type in ("causal", "instruct", "seq2seq"):
        return result.row_loss.tolist(), result.row_count.tolist()
    assert result.logits is not None
    logits = result.logits.detach().float().cpu()
    if task_type == "classification":
        return logits.argmax(dim=-1).tolist(), labels.tolist()
    if task_type == "multilabel":
        return list((logits > 0).int().numpy()), list(labels.int().numpy())
    if task_type == "regression":
        return logits[:, 0].tolist(), labels.tolist()
    ids = logits.argmax(dim=-1)
    kept = [row != IGNORED for row in labels]
    return (
        [row[keep].numpy() for row, keep in zip(ids, kept, strict=True)],
        [row[keep].numpy() for row, keep in zip(labels, kept, strict=True)],
    )


@torch.inference_mode()
def predict(
    backbone: Backbone,
    head: Head | None,
    spec: TaskSpec,
    encoded: Encoded,
    *,
    tokens_per_batch: int | None = None,
    progress: Any | None = None,
) -> Answers:
    """Runs every row of a split through the backbone as it is plugged now.

    Args:
        backbone: the backbone, with bricks plugged in or bare.
        head: the task's head; None where the language model answers.
        spec: the task.
        encoded: the split.
        tokens_per_batch: most tokens of a batch; what suits the device unless given.
        progress: called with the number of rows done after each batch.
    """
    answers = Answers(spec)
    tokens = tokens_per_batch or evaluation_tokens(backbone.device)
    batches = EvaluationDataset({spec.name: encoded}, tokens, backbone.tokenizer.pad_token_id)
    for batch in batches:
        moved = {k: v.to(backbone.device) if torch.is_tensor(v) else v for k, v in batch.items()}
        answers.add(moved, compute(spec.type, backbone, head, moved))
        if progress is not None:
            progress(len(batch["index"]))
    return answers
