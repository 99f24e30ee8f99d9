"""Regression heads: the unit they learn in, and that it goes wherever the head goes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.heads import Head
from cfm_train.bricks.stored import open_brick, store
from cfm_train.data.encode import TaskData
from cfm_train.evaluation.evaluator import predict
from cfm_train.evaluation.floor import train_head
from cfm_train.library.store import Library
from cfm_train.training.task_head import new_head
from tests.backbones import tiny
from tests.merging.merges import merged
from tests.tasks import TRAINER, task_data
from tests.training.runs import new_brick, rows, train

#: The second scale of the targets: as a price in a small currency might be.
TIMES, PLUS = 4096.0, 250_000.0


def scaled(backbone: Backbone, times: float = 1.0, plus: float = 0.0) -> TaskData:
    data = task_data(backbone, "regression")
    for split in (data.train, data.validation, data.test):
        assert split is not None
        split.arrays["labels"] = (split.arrays["labels"] * times + plus).astype(np.float32)
    return data


def said(backbone: Backbone, brick: Brick, data: TaskData, head: Head | None = None) -> np.ndarray:
    assert data.test is not None
    head = head or brick.head_for("regression")
    with backbone.slots.plugged([brick]):
        answers = predict(backbone, head, data.spec, data.test, tokens_per_batch=512)
    assert [answers.references[i] for i in range(len(data.test))] == list(
        data.test.arrays["labels"]
    )
    return np.array([answers.predictions[i] for i in range(len(data.test))])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_scale_of_the_targets_changes_nothing(family: str, tmp_path: Path) -> None:
    """y and 4096 y + 250000: the same losses, and answers that differ by that very map."""
    backbone = tiny(family)
    answers, floors, losses = [], [], []
    for times, plus in ((1.0, 0.0), (TIMES, PLUS)):
        data = scaled(backbone, times, plus)
        brick = new_brick(backbone, {"regression": data}, "lora")
        folder = tmp_path / str(times)
        train(backbone, brick, {"regression": data}, folder, max_steps=10)
        answers.append((said(backbone, brick, data) - plus) / times)
        losses.append([row["train/loss"] for row in rows(folder) if "train/loss" in row])
        floor = train_head(backbone, data, {**TRAINER, "max_steps": 10}, seed=0)
        bare = new_brick(backbone, {}, "lora")
        floors.append((said(backbone, bare, data, floor) - plus) / times)
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    for one, other in (answers, floors):
        np.testing.assert_allclose(other, one, atol=1e-3 * one.std() + 1e-4)
        assert one.std() > 0


def test_an_untrained_head_says_the_mean(tmp_path: Path) -> None:
    """Its loss is about 1, the variance in its own unit, whatever the targets' scale."""
    backbone = tiny("bert")
    data = scaled(backbone, TIMES, PLUS)
    labels = data.train.arrays["labels"].astype(np.float64)
    head = new_head(backbone, data, 0)
    assert head.center is not None and head.spread is not None
    assert head.center.item() == pytest.approx(labels.mean(), rel=1e-6)
    assert head.spread.item() == pytest.approx(labels.std(), rel=1e-6)
    torch.nn.init.zeros_(head.linear.weight)
    answers = predict(backbone, head, data.spec, data.train, tokens_per_batch=512)
    assert list(answers.predictions.values()) == pytest.approx([labels.mean()] * len(labels))
    assert answers.loss() == pytest.approx(1.0, rel=1e-4)
    rmse = answers.scores(bootstrap=0, seed=0)["rmse"].value
    assert rmse == pytest.approx(labels.std(), rel=1e-4)


def test_equal_targets_are_no_division_by_zero() -> None:
    head = Head("regression", None, 4, "mean")
    head.take_unit(torch.full((3,), 0.1))
    assert head.center is not None and head.spread is not None
    assert head.center.item() == pytest.approx(0.1) and head.spread.item() == 1


def test_the_unit_goes_through_library_and_merge(tmp_path: Path) -> None:
    backbone = tiny("bert")
    data = scaled(backbone, TIMES, PLUS)
    brick = new_brick(backbone, {"regression": data}, "lora")
    train(backbone, brick, {"regression": data}, tmp_path / "run", max_steps=3)
    library = Library(tmp_path / "library")
    store(brick, library, backbone, name="x", operation="train")
    again = open_brick(library.find("x"), library, backbone)
    other = new_brick(backbone, {}, "lora")
    result = merged("linear", [again, other], [1.0, 0.0], backbone)
    for other in (again, result.brick):
        np.testing.assert_allclose(
            said(backbone, other, data), said(backbone, brick, data), rtol=1e-5
        )
        assert other.head_for("regression").spread > TIMES / 10
