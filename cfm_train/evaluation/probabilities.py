"""Answers of a head in words, with probabilities."""

from __future__ import annotations

from typing import Any

import torch

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.data.encode import Encoded
from cfm_train.data.tasks import TaskSpec
from cfm_train.training.dataset import EvaluationDataset, evaluation_tokens


@torch.inference_mode()
def head_answers(
    backbone: Backbone, brick: Brick, spec: TaskSpec, encoded: Encoded
) -> list[dict[str, Any]]:
    """What a head says to every row, in order.

    Args:
        backbone: the backbone with the brick plugged in.
        brick: the brick that brings the head.
        spec: the head's task.
        encoded: the rows.

    Returns:
        For each row ``prediction`` (a label, a list of labels, a number, or one tag for each
        word, null where the row was cut before it), and ``probabilities`` by label where the task
        has one answer or several out of a list.
    """
    head = brick.heads[spec.name]
    labels = list(spec.labels or ())
    answers: list[dict[str, Any]] = [{}] * len(encoded)
    tokens = evaluation_tokens(backbone.device)
    batches = EvaluationDataset({spec.name: encoded}, tokens, backbone.tokenizer.pad_token_id)
    for batch in batches:
        mask = batch["attention_mask"].to(backbone.device)
        extra = {k: batch[k].to(backbone.device) for k in ("token_type_ids",) if k in batch}
        hidden = backbone.hidden_states(batch["input_ids"].to(backbone.device), mask, **extra)
        logits = head(hidden, mask).cpu()
        for i, row in enumerate(batch["index"].tolist()):
            if spec.type == "token":
                tags = logits[i].argmax(-1).tolist()
                firsts = encoded.slice("first_tokens", row).tolist()
                answers[row] = {"prediction": [labels[tags[f]] if f >= 0 else None for f in firsts]}
            elif spec.type == "regression":
                answers[row] = {"prediction": round(logits[i, 0].item(), 6)}
            else:
                answers[row] = _labelled(spec.type, labels, logits[i])
    return answers


def _labelled(task_type: str, labels: list[str], logits: torch.Tensor) -> dict[str, Any]:
    several = task_type == "multilabel"
    shares = logits.sigmoid() if several else logits.softmax(-1)
    probabilities = {n: round(p, 6) for n, p in zip(labels, shares.tolist(), strict=True)}
    if several:
        return {
            "prediction": [n for n, x in zip(labels, logits.tolist(), strict=True) if x > 0],
            "probabilities": probabilities,
        }
    return {"prediction": labels[int(logits.argmax())], "probabilities": probabilities}
