"""Training by value: accumulation, clipping, the kept brick, stopping, and what a person sees."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from cfm_train.training.module import MONITOR, Diverged
from cfm_train.training.objectives import compute
from cfm_train.training.schedule import factor
from tests.backbones import tiny
from tests.tasks import task_data, whole_batch
from tests.training.runs import new_brick, rows, train


class Watch(Callback):
    """Keeps what a step leaves behind: its gradients, its rows, and the brick at validations."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.rows: list[int] = []
        self.validated: list[tuple[int, float, dict[str, torch.Tensor]]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        named = module.brick.named_parameters()
        self.gradients = {n: p.grad.clone() for n, p in named if p.grad is not None}
        self.rows = [i for micro in batch for i in micro["index"].tolist()]
        self.sizes = [len(micro["index"]) for micro in batch]

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        state = {name: value.clone() for name, value in module.brick.state_dict().items()}
        value = float(trainer.callback_metrics[MONITOR])
        self.validated.append((trainer.global_step, value, state))


@pytest.mark.parametrize(
    ("family", "task"), [("llama", "instruct"), ("bert", "token"), ("bert", "classification")]
)
def test_accumulation_weighs_items(family: str, task: str, tmp_path: Path) -> None:
    """Two micro-batches of different sizes give the gradient of all their rows in one batch."""
    backbone = tiny(family)
    data = task_data(backbone, task)
    watch = Watch()
    settings = {"max_steps": 1, "accumulate": 2, "clip": 0.0, "tokens_per_batch": 80}
    brick = new_brick(backbone, {task: data}, "lora")
    with torch.no_grad():
        for b in brick.lora_B.values():
            torch.nn.init.normal_(b, std=0.1, generator=torch.Generator().manual_seed(1))
    start = {name: value.clone() for name, value in brick.state_dict().items()}
    train(backbone, brick, {task: data}, tmp_path / "run", callbacks=[watch], **settings)
    assert len(watch.sizes) == 2 and watch.sizes[0] != watch.sizes[1]

    brick.load_state_dict(start)
    batch = whole_batch(backbone, task, data.train, torch.tensor(watch.rows).numpy())
    with backbone.slots.plugged([brick]):
        result = compute(task, backbone, brick.head_for(task), batch)
        (result.loss / result.count).backward()
    for name, value in brick.named_parameters():
        torch.testing.assert_close(watch.gradients[name], value.grad, atol=1e-6, rtol=1e-4)
    assert rows(tmp_path / "run")[0]["train/loss"] == pytest.approx(
        result.loss.item() / result.count, rel=1e-5
    )


def test_clipping(tmp_path: Path) -> None:
    """The norm before clipping is logged; the gradients used have the norm asked for."""
    backbone = tiny("bert")
    data = {"regression": task_data(backbone, "regression")}
    norms = {}
    for clip in (0.0, 1e-3):
        watch, folder = Watch(), tmp_path / f"{clip}"
        brick = new_brick(backbone, data, "lora")
        train(backbone, brick, data, folder, callbacks=[watch], max_steps=1, clip=clip)
        used = math.sqrt(sum(g.double().square().sum().item() for g in watch.gradients.values()))
        norms[clip] = (rows(folder)[0]["train/gradient_norm"], used)
    assert norms[0.0][0] == pytest.approx(norms[0.0][1], rel=1e-5)
    assert norms[1e-3] == (pytest.approx(norms[0.0][0], rel=1e-6), pytest.approx(1e-3, rel=1e-3))


def test_schedule_by_hand() -> None:
    def curve(schedule: str, total: int = 10, warmup: float = 0.2) -> list[float]:
        return [factor(i, total=total, warmup=warmup, schedule=schedule) for i in range(total)]

    assert curve("constant") == [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert curve("linear") == pytest.approx(
        [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    )
    assert curve("cosine", 4, 0.0) == pytest.approx(
        [1, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.5 - 0.5 * math.cos(math.pi / 4)]
    )
    # 0.07 * 100 is 7.000000000000001 in floating point: seven steps of warm-up all the same.
    assert curve("constant", 100, 0.07)[5:8] == pytest.approx([6 / 7, 1, 1])
    assert curve("linear", 1, 0.06) == [1.0]


def test_the_schedule_reaches_the_optimiser(tmp_path: Path) -> None:
    backbone = tiny("bert")
    data = {"regression": task_data(backbone, "regression")}
    brick = new_brick(backbone, data, "lora")
    options = {"max_steps": 5, "warmup": 0.4, "learning_rate": 0.01}
    fitted = train(backbone, brick, data, tmp_path / "run", **options)
    found = [r["train/learning_rate"] for r in rows(tmp_path / "run") if "train/loss" in r]
    assert found == pytest.approx([0.005, 0.01, 0.01, 0.01 * 2 / 3, 0.01 / 3])
    assert (fitted.steps, fitted.learning_rate, fitted.stopped) == (5, 0.01, "finished")


@pytest.mark.parametrize(("kind", "moves"), [("lora", (1e-4, 0.01)), ("head", (1e-4,))])
def test_heads_have_a_rate_of_their_own(
    kind: str, moves: tuple[float, ...], tmp_path: Path
) -> None:
    """AdamW's first step moves every number by its rate; heads alone follow the brick's."""
    backbone = tiny("bert")
    data = {"classification": task_data(backbone, "classification")}
    brick = new_brick(backbone, data, kind)
    before = {name: value.clone() for name, value in brick.state_dict().items()}
    options = {"warmup": 0.0, "learning_rate": 1e-4, "head_learning_rate": 0.01}
    train(backbone, brick, data, tmp_path / "run", max_steps=1, **options)
    moved: dict[bool, float] = {}
    for name, value in brick.state_dict().items():
        of_head = name.startswith("heads.")
        moved[of_head] = max(moved.get(of_head, 0.0), float((value - before[name]).abs().max()))
    assert [moved[key] for key in sorted(moved)] == pytest.approx(moves, rel=1e-3)


def test_the_best_brick_is_kept_and_the_last_step_is_validated(tmp_path: Path) -> None:
    """Whatever the interval, the last step counts too; the kept brick is the best, bit by bit."""
    backbone = tiny("bert")
    data = {"classification": task_data(backbone, "classification")}
    watch = Watch()
    brick = new_brick(backbone, data, "lora")
    options = {"max_steps": 11, "validate_every": 3, "learning_rate": 0.05, "schedule": "constant"}
    fitted = train(backbone, brick, data, tmp_path / "run", callbacks=[watch], **options)
    assert [step for step, _, _ in watch.validated] == [3, 6, 9, 11]
    best = max(watch.validated, key=lambda entry: (entry[1], -entry[0]))
    assert fitted.best_step == best[0]
    for name, value in brick.state_dict().items():
        assert torch.equal(value, best[2][name]), name
    assert [r["step"] for r in rows(tmp_path / "run") if "validation/loss" in r] == [3, 6, 9, 11]


def test_early_stopping(tmp_path: Path) -> None:
    """Without learning nothing gets better: two validations without progress end the run."""
    backbone = tiny("bert")
    data = {"classification": task_data(backbone, "classification")}
    brick = new_brick(backbone, data, "lora")
    options = {"max_steps": 40, "validate_every": 2, "patience": 2, "learning_rate": 0.0}
    fitted = train(backbone, brick, data, tmp_path / "run", **options)
    assert (fitted.steps, fitted.best_step, fitted.stopped) == (6, 2, "early")
    again = train(backbone, brick, data, tmp_path / "run", **options)  # nothing is left to do
    assert (again.steps, again.best_step, again.stopped) == (6, 2, "early")


def test_a_loss_that_is_no_number_names_its_row(tmp_path: Path) -> None:
    """Of the rows of a batch only one is too far from the mean for float32: it is named."""
    backbone = tiny("bert")
    data = task_data(backbone, "regression")
    labels = np.full_like(data.train.arrays["labels"], -3e38)
    labels[7] = 3e38  # mean and deviation are finite, its distance to the mean is not
    data.train.arrays["labels"] = labels
    brick = new_brick(backbone, {"regression": data}, "lora")
    with pytest.raises(Diverged) as caught:
        train(backbone, brick, {"regression": data}, tmp_path / "run", rows_per_batch=4)
    assert caught.value.rows == [("regression", 7)]
    step = int(re.fullmatch(r"the loss is inf at step (\d+)", str(caught.value)).group(1))
    done = [r["step"] for r in rows(tmp_path / "run")]
    assert step == (max(done) if done else 0) + 1


def test_a_loss_that_grows_stops_the_run(tmp_path: Path) -> None:
    """The rate rises until nothing holds: the mean of twenty steps against that of the first."""
    backbone = tiny("bert")
    data = {"regression": task_data(backbone, "regression")}
    brick = new_brick(backbone, data, "lora")
    options = {"max_steps": 200, "divergence": 3.0, "warmup": 0.9}
    options |= {"learning_rate": 5.0, "head_learning_rate": 5.0}
    with pytest.raises(Diverged) as caught:
        train(backbone, brick, data, tmp_path / "run", **options)
    losses = [r["train/loss"] for r in rows(tmp_path / "run") if "train/loss" in r]
    first, last, step = re.fullmatch(
        r"the loss grew from (\S+) to (\S+) by step (\d+)", str(caught.value)
    ).groups()
    assert int(step) == len(losses) + 1 and int(step) % 20 == 0
    assert float(first) == pytest.approx(sum(losses[:20]) / 20, rel=1e-3)
    assert float(last) > 3 * float(first)
    windows = [sum(losses[i : i + 20]) / 20 for i in range(20, len(losses) - 19, 20)]
    assert all(mean <= 3 * float(first) for mean in windows)
    assert {task for task, _ in caught.value.rows} == {"regression"}


def test_deterministic_runs_are_equal_to_the_bit(tmp_path: Path) -> None:
    backbone = tiny("bert")
    data = {"classification": task_data(backbone, "classification")}
    bricks = []
    for name in ("one", "two"):
        brick = new_brick(backbone, data, "lora", dropout=0.2)
        train(backbone, brick, data, tmp_path / name, max_steps=4, deterministic=True)
        bricks.append(brick.state_dict())
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(value, bricks[1][name]) for name, value in bricks[0].items())
    assert rows(tmp_path / "one") == rows(tmp_path / "two")


def test_the_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = tiny("bert")
    data = {"classification": task_data(backbone, "classification")}
    fitted = train(backbone, new_brick(backbone, data, "lora"), data, tmp_path / "run", max_steps=3)
    shown = capsys.readouterr().err
    last = shown.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("3/3|")
    figures = r"loss \d+\.\d{3}, \d+ samples/s, \d+ tokens/s, \d+% of the FLOP limit, \d+\.\d GiB"
    assert re.search(figures, last), last
    assert fitted.rows == 24 and fitted.tokens > fitted.rows and fitted.train_seconds > 0
    assert fitted.flop_share is not None and 0 < fitted.flop_share < 1


def test_several_tasks_share_a_brick(tmp_path: Path) -> None:
    """Every task has its own head and figures; the best brick is chosen by their mean."""
    backbone = tiny("bert")
    data = {name: task_data(backbone, name) for name in ("classification", "regression")}
    brick = new_brick(backbone, data, "lora")
    watch = Watch()
    train(backbone, brick, data, tmp_path / "run", max_steps=4, callbacks=[watch])
    assert set(brick.heads) == set(data)
    (row,) = [r for r in rows(tmp_path / "run") if "validation/monitor" in r]
    mean = (row["validation/classification/accuracy"] + row["validation/regression/pearson"]) / 2
    assert row["validation/monitor"] == pytest.approx(mean, abs=1e-6)
    assert watch.validated[0][1] == pytest.approx(mean, abs=1e-6)
