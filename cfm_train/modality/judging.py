"""What a trained connector is worth: its loss, the same with shuffled items, and what it does to
text.

A connector that ignores its input does as well on another row's items: the gain, the loss with
shuffled items less the loss with the right ones, is then zero. On text alone it must do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.data.encode import TaskData
from cfm_train.data.sources import Checked
from cfm_train.evaluation.evaluator import predict
from cfm_train.evaluation.intervals import paired_interval
from cfm_train.modality.encoding import ItemRows
from cfm_train.modality.items import hashes
from cfm_train.modality.modality import Modality
from cfm_train.modality.writing import write_answers

#: Rows of text that the check looks at.
PROBE = 4


@dataclass(frozen=True)
class Judged:
    """Figures, checks and samples for the record."""

    figures: dict[str, dict[str, Any]]
    checks: dict[str, dict[str, Any]]
    samples: list[dict[str, Any]]


def judge(
    config: Mapping[str, Any],
    backbone: Backbone,
    brick: Brick,
    eyes: Modality,
    task: TaskData,
    other: ItemRows | None,
    checked: Checked,
    bare: Tensor,
) -> Judged:
    """Judges a trained brick on the test rows; without test rows by its checks alone.

    Args:
        config: of the run: ``seed``, ``evaluation``, ``trainer.samples``.
        backbone: nothing plugged.
        brick: what was trained.
        eyes: the modality brick in it, which must do nothing to text; a LoRA beside it may.
        task: the splits as token numbers.
        other: the test rows with each other's items; None where there is no other item.
        checked: the rows.
        bare: what `bare_text` gave before the brick was built.
    """
    figures: dict[str, dict[str, Any]] = {}
    samples: list[dict[str, Any]] = []
    if task.test is not None:
        assert isinstance(task.test, ItemRows)
        losses = {}
        arms = {"test": task.test} | ({} if other is None else {"shuffled": other})
        with backbone.slots.plugged([brick]):
            for name, rows in arms.items():
                answers = predict(backbone, None, task.spec, rows)
                scores = answers.scores(
                    bootstrap=config["evaluation"]["bootstrap"], seed=config["seed"]
                )
                figures[f"{name}/loss"] = scores["loss"].as_dict()
                losses[name] = np.array(
                    [s / max(1, n) for _, (s, n) in sorted(answers.losses.items())]
                )
            samples = write_answers(backbone, task.test, config["trainer"]["samples"])
        if other is None:
            print("test: all rows are about one item, so there is no control with another's.")
        else:
            # Rows about the same items are one draw: five captions of an image are not five images.
            about = [tuple(hashes(row)) for row in task.test.rows]
            gain = paired_interval(
                by_items(losses["shuffled"], about),
                by_items(losses["test"], about),
                bootstrap=config["evaluation"]["bootstrap"],
                seed=config["seed"],
            )
            figures["gain over shuffled/loss"] = gain.as_dict()
    with backbone.slots.plugged([eyes]):
        moved = float((bare_text(backbone, checked) - bare).abs().max())
    same = torch.equal(bare_text(backbone, checked), bare)
    return Judged(
        figures,
        {
            "text logits": {"value": moved, "tolerance": 0.0, "passed": moved == 0.0},
            "unplugged equals bare": {"value": same, "tolerance": None, "passed": same},
        },
        samples,
    )


def by_items(losses: np.ndarray, about: Sequence[tuple[str, ...]]) -> np.ndarray:
    """The mean loss of the rows about each item, float64 ``[different items]``.

    Args:
        losses: of each row.
        about: the items of each.
    """
    held: dict[tuple[str, ...], list[float]] = {}
    for loss, items in zip(losses, about, strict=True):
        held.setdefault(items, []).append(float(loss))
    return np.array([np.mean(each) for each in held.values()])


@torch.inference_mode()
def bare_text(backbone: Backbone, checked: Checked) -> Tensor:
    """Logits of some rows' texts alone, as the backbone is plugged now."""
    texts = [
        row["answer"] if "answer" in row else row["turns"][-1]["content"]
        for row in checked.rows["train"][:PROBE]
    ]
    tokenizer = backbone.tokenizer
    whole = tokenizer(texts, truncation=True, max_length=64)["input_ids"]
    width = max(2, *(len(ids) for ids in whole))
    ids = torch.full((len(whole), width), int(tokenizer.pad_token_id))
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(whole):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        mask[row, : max(1, len(tokens))] = 1
    backbone.slots.take({})
    device = backbone.device
    return backbone.logits(input_ids=ids.to(device), attention_mask=mask.to(device)).float()
