"""Objectives: what a task type minimises, as a sum over items and the number of items.

A sum and a count, never a mean: micro-batches are added up and divided once by the whole group's
count, so that every row (or token) weighs the same however the batches fell.

    classification   cross entropy on the head's logits        per row
    multilabel       binary cross entropy, summed over labels  per row
    regression       squared error of standardised targets     per row
    token            cross entropy on labelled tokens          per token
    causal, instruct cross entropy on the next token           per token that has a label
    seq2seq          the same on the decoder                   per target token
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.heads import Head
from cfm_train.data.tasks import HEADED, IGNORED

if TYPE_CHECKING:
    from cfm_train.bricks.brick import Brick
    from cfm_train.data.encode import Encoded

Batch = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What an objective computes of one micro-batch.

    Attributes:
        loss: sum over items, a scalar float32 tensor.
        count: number of items.
        logits: the head's logits (headed tasks; in regression its answers, in the targets' own
            unit), else None.
        row_loss: ``[batch]`` float32, each row's sum.
        row_count: ``[batch]`` int64, each row's number of items.
    """

    loss: Tensor
    count: int
    logits: Tensor | None
    row_loss: Tensor
    row_count: Tensor


class Learning(Protocol):
    """What is minimised in place of the task types' own objectives (knowledge bricks).

    Attributes:
        beside: rows of which every step takes a micro-batch beside each of its own, None for none.
        weight: the factor on their loss; it is divided by their own item count.
    """

    beside: Encoded | None

    @property
    def weight(self) -> float: ...

    def loss(self, backbone: Backbone, brick: Brick, batch: Batch, *, training: bool) -> Result:
        """The loss of one micro-batch; the brick is plugged in."""
        ...

    def tokens_read(self, batch: Batch) -> int:
        """Real tokens that `loss` sends through the backbone without gradients."""
        ...


#: The task name of batches from ``Learning.beside``: with a blank, as no run can be called.
BESIDE = "unrelated text"


def count_items(task_type: str, batch: Batch) -> int:
    """How many items of a batch the loss is summed over, known before the forward pass."""
    labels = batch["labels"]
    if task_type in ("classification", "multilabel", "regression"):
        return int(labels.shape[0])
    if task_type in ("causal", "instruct"):  # the first token has nothing before it
        return int((labels[:, 1:] != IGNORED).sum())
    return int((labels != IGNORED).sum())


def compute(task_type: str, backbone: Backbone, head: Head | None, batch: Batch) -> Result:
    """The loss of one micro-batch with whatever is plugged into the backbone.

    Args:
        task_type: a task type of `data.tasks`.
        backbone: the frozen backbone.
        head: the task's head, None where the language model's own answers.
        batch: ``input_ids`` and ``attention_mask`` int64 ``[batch, seq]``, ``labels`` by task type.
    """
    backbone.slots.take(batch)
    if task_type in HEADED:
        assert head is not None
        extra = {key: batch[key] for key in ("token_type_ids",) if key in batch}
        hidden_states = backbone.hidden_states(batch["input_ids"], batch["attention_mask"], **extra)
        return headed_result(
            head, head.raw(hidden_states, batch["attention_mask"]), batch["labels"]
        )
    if task_type == "seq2seq":
        logits = backbone.logits(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
        )
        return _tokens(logits, batch["labels"])
    return _next_token(backbone, batch)


def headed_result(head: Head, logits: Tensor, labels: Tensor) -> Result:
    """The loss of what a head's linear map gave, see `Head.raw`.

    Args:
        head: the head: its task type says which loss, and in regression its unit.
        logits: ``[batch, labels]`` (``token``: ``[batch, seq, labels]``).
        labels: what is right, by task type; numbers in their own unit.
    """
    task_type = head.task_type
    ones = torch.ones(len(labels), dtype=torch.int64, device=labels.device)
    if task_type == "classification":
        rows = F.cross_entropy(logits, labels, reduction="none")
    elif task_type == "multilabel":
        rows = F.binary_cross_entropy_with_logits(
            logits, labels.to(logits.dtype), reduction="none"
        ).sum(dim=1)
    elif task_type == "regression":
        rows = F.mse_loss(logits[:, 0], head.standardise(labels), reduction="none")
    else:
        return _tokens(logits, labels)
    return Result(rows.sum(), len(labels), head.answer(logits), rows.detach(), ones)


def _tokens(logits: Tensor, labels: Tensor) -> Result:
    """Cross entropy of ``[batch, seq, classes]`` against ``[batch, seq]`` with -100 left out."""
    # Row by row: across a stride, as ``[batch, classes, seq]``, a softmax takes several times as
    # long.
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
    ).view_as(labels)
    counts = (labels != IGNORED).sum(dim=1)
    return Result(losses.sum(), int(counts.sum()), logits, losses.detach().sum(dim=1), counts)


def next_token_logits(backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor]:
    """What is said about the tokens that have a label, with whatever is plugged in.

    The vocabulary is multiplied only where some row has a label.

    Args:
        backbone: a language model.
        batch: ``input_ids``, ``labels`` (-100 where nothing counts), and ``position_ids`` or
            ``attention_mask``, int64 ``[batch, seq]``.

    Returns:
        Logits ``[batch, places, vocabulary]``, and what is right there, -100 where nothing counts,
        int64 ``[batch, places]``.
    """
    targets, positions = next_tokens(batch["labels"])
    # A block of several documents says where each begins by its positions alone: transformers keeps
    # them apart in attention only where it is given no mask (padding then is a document of its
    # own).
    key = "position_ids" if "position_ids" in batch else "attention_mask"
    logits = logits_at(backbone, positions, input_ids=batch["input_ids"], **{key: batch[key]})
    return logits, targets[:, positions]


def next_tokens(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels moved to the token that predicts them, and the places where any row has one.

    Args:
        labels: int64 ``[batch, seq]``, -100 where nothing counts.

    Returns:
        Targets ``[batch, seq]`` and places ``[places]``.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # token i predicts token i + 1
    return targets, (targets != IGNORED).any(dim=0).nonzero()[:, 0]


def logits_at(backbone: Backbone, positions: Tensor, **inputs: Tensor) -> Tensor:
    """Logits ``[batch, places, vocabulary]`` at some places; the others are left out early."""
    extra: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(backbone.model.forward).parameters:
        extra["logits_to_keep"] = positions
    logits = backbone.logits(**inputs, **extra)
    return logits if logits.shape[1] == len(positions) else logits[:, positions]


def _next_token(backbone: Backbone, batch: Batch) -> Result:
    """Next-token loss."""
    result = _tokens(*next_token_logits(backbone, batch))
    return Result(result.loss, result.count, None, result.row_loss, result.row_count)
