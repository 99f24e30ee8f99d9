"""The learning-rate range test: what it reads off a curve, and what it leaves untouched."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cfm_train.training.lr_finder import steepest
from cfm_train.training.module import Diverged
from tests.backbones import tiny
from tests.tasks import task_data
from tests.training.runs import BreakOff, BrokenOff, new_brick, rows, train


def test_the_steepest_point_of_a_known_curve() -> None:
    """A logistic fall around 1e-3, then a rise: the suggestion is where the fall is steepest."""
    rates = [10 ** (-6 + i / 10) for i in range(61)]
    losses = [1 / (1 + math.exp(3 * (math.log10(r) + 3))) + 50 * max(0, r - 0.3) for r in rates]
    assert math.log10(steepest(rates, losses)) == pytest.approx(-3, abs=0.11)
    assert steepest([1e-3, 1e-2, 1e-1], [3.0, 2.0, 9.0]) == 1e-2


def test_the_suggestion_trains_well_and_the_brick_starts_afresh(tmp_path: Path) -> None:
    """The brick enters training as it was made, to the bit; the rate is neither idle nor wild."""
    backbone = tiny("bert")
    data = {"token": task_data(backbone, "token", rows=200)}
    brick = new_brick(backbone, data, "lora")
    before = {name: value.clone() for name, value in brick.state_dict().items()}
    options = {"max_steps": 120, "find_learning_rate": True}
    with pytest.raises(BrokenOff):
        train(backbone, brick, data, tmp_path / "run", callbacks=[BreakOff(0)], **options)
    assert all(torch.equal(value, before[name]) for name, value in brick.state_dict().items())
    curve = json.loads((tmp_path / "run" / "learning_rate.json").read_text())
    assert curve["suggestion"] in curve["learning_rate"]
    assert len(curve["loss"]) == len(curve["learning_rate"]) >= 20
    assert 1e-4 < curve["suggestion"] < 0.5

    # The head at the same rate, as in the sweep: else it would learn with an idle body too.
    options |= {"checkpoint_every": 20, "head_learning_rate": curve["suggestion"]}
    fitted = train(backbone, brick, data, tmp_path / "run", **options)
    assert fitted.learning_rate == curve["suggestion"]

    def end(rate: float) -> float:
        folder = tmp_path / str(rate)
        fresh = new_brick(backbone, data, "lora")
        rates = {"learning_rate": rate, "head_learning_rate": rate}
        train(backbone, fresh, data, folder, max_steps=120, **rates)
        losses = [r["train/loss"] for r in rows(folder) if "train/loss" in r]
        return sum(losses[-10:]) / 10

    losses = [r["train/loss"] for r in rows(tmp_path / "run") if "train/loss" in r]
    assert sum(losses[-10:]) / 10 < 0.5 * end(1e-6)


def test_a_resumed_run_keeps_the_rate(tmp_path: Path) -> None:
    """From the checkpoint, not from the curve: a file that is gone or damaged changes nothing."""
    backbone = tiny("bert")
    data = {"regression": task_data(backbone, "regression")}
    options = {"max_steps": 6, "checkpoint_every": 2, "find_learning_rate": True, "warmup": 0.0}
    options["schedule"] = "constant"
    with pytest.raises(BrokenOff):
        train(
            backbone,
            new_brick(backbone, data, "lora"),
            data,
            tmp_path / "run",
            callbacks=[BreakOff(3)],
            **options,
        )
    (tmp_path / "run" / "learning_rate.json").unlink()
    brick = new_brick(backbone, data, "lora")
    fitted = train(backbone, brick, data, tmp_path / "run", **options)
    rates = {r["train/learning_rate"] for r in rows(tmp_path / "run") if "train/loss" in r}
    assert rates == {fitted.learning_rate}


def test_a_loss_that_is_no_number_from_the_start(tmp_path: Path) -> None:
    backbone = tiny("bert")
    data = task_data(backbone, "regression")
    labels = np.full_like(data.train.arrays["labels"], -3e38)
    labels[::4] = 3e38  # mean and deviation are finite, the distance of these to the mean is not
    data.train.arrays["labels"] = labels
    brick = new_brick(backbone, {"regression": data}, "lora")
    with pytest.raises(Diverged, match="the loss is inf at a rate of 1e-06") as caught:
        train(backbone, brick, {"regression": data}, tmp_path / "run", find_learning_rate=True)
    assert len(caught.value.rows) == 8
