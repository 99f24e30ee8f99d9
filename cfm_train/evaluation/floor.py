"""The lower bound: the bare backbone with a head trained alone, on the same budget as a brick.

The backbone is frozen, so its features are computed once and the head trains on them. Up to
rounding it comes to what training on top of the running backbone would give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.head import HeadOnly
from cfm_train.bricks.heads import Head, pool
from cfm_train.data.batches import BatchStream
from cfm_train.data.encode import Encoded, TaskData
from cfm_train.data.tasks import HEADED
from cfm_train.evaluation.evaluator import Answers
from cfm_train.evaluation.judge import Judged, judge
from cfm_train.training.dataset import EvaluationDataset, evaluation_tokens, plan_steps
from cfm_train.training.module import monitored
from cfm_train.training.objectives import Result, headed_result
from cfm_train.training.schedule import factor
from cfm_train.training.task_head import new_head


def floor_of(
    backbone: Backbone,
    tasks: Mapping[str, TaskData],
    settings: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    *,
    seed: int,
) -> Judged:
    """Scores of the frozen backbone with heads trained alone.

    Args:
        backbone: the backbone, nothing plugged.
        tasks: the tasks.
        settings: the ``trainer`` section: epochs, steps and batches are the brick's own.
        evaluation: the ``evaluation`` section.
        seed: as for the brick.
    """
    brick = HeadOnly().build(backbone)
    for name, task in tasks.items():
        if task.spec.type in HEADED:
            brick.add_head(name, train_head(backbone, task, settings, seed=seed))
    return judge(backbone, brick.eval(), tasks, evaluation, seed=seed)


def train_head(
    backbone: Backbone, task: TaskData, settings: Mapping[str, Any], *, seed: int
) -> Head:
    """A head trained on frozen features; the best by validation is kept.

    Args:
        backbone: the backbone as it is plugged: bare for the floor, with a brick to refit a head
            on it.
        task: a task with a head.
        settings: the ``trainer`` section.
        seed: seed of batches and of the head's first values.

    Raises:
        RuntimeError: the loss or its gradient is not finite.
    """
    spec = task.spec
    head = new_head(backbone, task, seed)
    splits = [task.train, *([task.validation] if task.validation else [])]
    rows = sum(map(len, splits))
    with tqdm(
        total=rows, desc=f"features of {spec.name}", unit="row", leave=False, disable=None
    ) as bar:
        train, *others = [
            frozen_features(backbone, split, head.pooling, progress=bar.update) for split in splits
        ]
    kept = others[0] if others else None
    stream = BatchStream(
        {spec.name: task.train.lengths},
        tokens_per_batch=settings["tokens_per_batch"],
        rows_per_batch=settings["rows_per_batch"],
        seed=seed,
    )
    total, every = plan_steps(stream, settings)
    accumulate, clip = settings["accumulate"], settings["clip"] or math.inf
    rate = settings["head_learning_rate"]
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=settings["weight_decay"])
    best, best_state, waited = -math.inf, head.state_dict(), 0
    steps = tqdm(range(total), desc=f"head of {spec.name}", unit="step", leave=False, disable=None)
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = rate * factor(
                step, total=total, warmup=settings["warmup"], schedule=settings["schedule"]
            )
        micro = range(step * accumulate, (step + 1) * accumulate)
        results = [_on_features(head, train, stream.batch_at(i)[1]) for i in micro]
        optimizer.zero_grad(set_to_none=True)
        loss = torch.stack([r.loss for r in results]).sum()
        (loss / max(1, sum(r.count for r in results))).backward()
        norm = torch.nn.utils.clip_grad_norm_(head.parameters(), clip)
        if not math.isfinite(norm):
            raise RuntimeError(
                f"The head of '{spec.name}' alone diverged at step {step + 1}: lower "
                "trainer.clip, or look at the features that the backbone makes of its rows."
            )
        optimizer.step()
        if kept and ((step + 1) % every == 0 or step + 1 == total):
            value = _validate(head, task, kept)
            waited += 1
            if value > best:
                best, waited = value, 0
                best_state = {k: v.clone() for k, v in head.state_dict().items()}
            if settings["patience"] and waited >= settings["patience"]:
                break
    steps.close()
    head.load_state_dict(best_state)
    return head.eval()


Features = tuple[list[Tensor], list[Tensor]]


@torch.inference_mode()
def frozen_features(
    backbone: Backbone, encoded: Encoded, pooling: str, *, progress: Callable[[int], Any]
) -> Features:
    """What the head will see of every row, and the row's labels.

    Args:
        backbone: the backbone as it is plugged.
        encoded: the split.
        pooling: the head's.
        progress: called with the number of rows done after each batch.

    Returns:
        For each row its features, ``[hidden]`` or ``[tokens, hidden]`` float32, and its labels.
    """
    features: list[Tensor] = [torch.empty(0)] * len(encoded)
    labels: list[Tensor] = [torch.empty(0)] * len(encoded)
    device = backbone.device
    batches = EvaluationDataset(
        {"features": encoded}, evaluation_tokens(device), backbone.tokenizer.pad_token_id
    )
    for batch in batches:
        mask = batch["attention_mask"].to(device)
        extra = {k: batch[k].to(device) for k in ("token_type_ids",) if k in batch}
        hidden = backbone.hidden_states(batch["input_ids"].to(device), mask, **extra)
        pooled = pool(hidden, mask, pooling)
        for i, row in enumerate(batch["index"].tolist()):
            length = int(batch["attention_mask"][i].sum())
            whole = pooling == "none"
            features[row] = pooled[i, :length].clone() if whole else pooled[i].clone()
            labels[row] = batch["labels"][i, :length] if whole else batch["labels"][i]
        progress(len(batch["index"]))
    return features, labels


def _on_features(head: Head, data: Features, rows: Any) -> Result:
    features, labels = data
    chosen = [int(row) for row in rows]
    if head.pooling == "none":
        inputs = torch.cat([features[row] for row in chosen])[None]
        right = torch.cat([labels[row] for row in chosen])[None].to(inputs.device)
    else:
        inputs = torch.stack([features[row] for row in chosen])
        right = torch.stack([labels[row] for row in chosen]).to(inputs.device)
    return headed_result(head, head.linear(inputs.clone()), right)


@torch.no_grad()
def _validate(head: Head, task: TaskData, data: Features) -> float:
    answers = Answers(task.spec)
    for start in range(0, len(data[0]), 512):
        rows = np.arange(start, min(start + 512, len(data[0])))
        if head.pooling == "none":
            for row in rows:
                result = _on_features(head, data, [row])
                answers.add({"index": torch.tensor([row]), "labels": data[1][row][None]}, result)
        else:
            batch = {
                "index": torch.from_numpy(rows),
                "labels": torch.stack([data[1][r] for r in rows]),
            }
            answers.add(batch, _on_features(head, data, rows))
    figures = {"loss": answers.loss()}
    figures |= {k: v.value for k, v in answers.scores(bootstrap=0, seed=0).items()}
    return monitored(task.spec, figures)
