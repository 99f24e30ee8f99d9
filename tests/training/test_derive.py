"""A brick that is not trained: made from data, written down, the same each time."""

from __future__ import annotations

from pathlib import Path

import pytest

from cfm_train.errors import UserError
from cfm_train.tracking.metrics_file import MetricsFile
from cfm_train.tracking.wandb_run import WandbRun
from cfm_train.training.derive import derive
from tests.backbones import tiny
from tests.tasks import task_data
from tests.training.runs import new_brick


def test_what_was_tried_is_in_the_metrics(tmp_path: Path) -> None:
    backbone = tiny("llama")
    tasks = {"toy": task_data(backbone, "instruct")}
    made = []
    for run in ("one", "two"):
        folder = tmp_path / run
        folder.mkdir()
        brick = new_brick(backbone, tasks, "task_vector", contexts=3, demonstrations=2)
        metrics = MetricsFile(folder / "metrics.jsonl")
        wandb = WandbRun("disabled", "p", None, "train", [], {}, folder)
        fitted = derive(backbone, brick, tasks, 0, metrics, wandb)
        wandb.finish(0)
        rows = metrics.rows()
        assert [row["tried"] for row in rows] == ["without", "layer.0", "layer.1"]
        best = min(rows[1:], key=lambda row: row["validation/loss"])["tried"]
        assert brick.site_names == (best,)
        assert fitted.steps == 0 and fitted.rows == 9 and fitted.tokens > 0
        assert fitted.flop_share is None
        made.append((brick.files(), rows))
    assert made[0] == made[1]


def test_a_kind_that_is_trained_cannot_be_derived() -> None:
    backbone = tiny("llama")
    tasks = {"toy": task_data(backbone, "instruct")}
    with pytest.raises(UserError, match="Bricks of kind lora are trained"):
        new_brick(backbone, tasks, "lora").fit_without_training(backbone, tasks, 0)
