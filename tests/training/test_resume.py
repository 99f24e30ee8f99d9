"""A run broken off in this process goes on as the unbroken one does, for several kinds of brick."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from cfm_train.data.encode import TaskData
from cfm_train.tracking.wandb_run import WandbRun
from cfm_train.training.checkpoint import LAST, read_position, save_atomically
from cfm_train.training.samples import SampleOutputs
from tests.backbones import tiny
from tests.tasks import task_data
from tests.training.runs import BreakOff, BrokenOff, new_brick, rows, train

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.1},
    "ia3": {},
    "soft_prompt": {},
    "adalora": {
        "options": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "lora_dropout": 0.1}
    },
}
OPTIONS: dict[str, Any] = {"max_steps": 8, "validate_every": 4, "checkpoint_every": 2}


def tasks(backbone: Any) -> dict[str, TaskData]:
    return {"classification": task_data(backbone, "classification")}


def hyper(kind: str) -> dict[str, Any]:
    from cfm_train.config.compose import option

    own = KINDS[kind]
    if "options" in own:
        return {"options": {**option("brick", kind)["options"], **own["options"]}}
    return own


def states(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / LAST, weights_only=True)  # type: ignore[no-any-return]


def same(a: Any, b: Any) -> bool:
    """Equal values, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("kind", list(KINDS))
def test_resume_is_exact(kind: str, tmp_path: Path) -> None:
    """Broken off after step 5, taken up at the checkpoint of step 4: nothing tells them apart."""
    backbone = tiny("llama")
    data = tasks(backbone)
    whole = new_brick(backbone, data, kind, **hyper(kind))
    train(backbone, whole, data, tmp_path / "whole", accumulate=2, **OPTIONS)
    broken = new_brick(backbone, data, kind, **hyper(kind))
    with pytest.raises(BrokenOff):
        train(
            backbone,
            broken,
            data,
            tmp_path / "broken",
            accumulate=2,
            callbacks=[BreakOff(5)],
            **OPTIONS,
        )
    assert read_position(tmp_path / "broken" / "checkpoints").step == 4
    assert [r["step"] for r in rows(tmp_path / "broken") if "train/loss" in r] == [1, 2, 3, 4, 5]
    again = new_brick(backbone, data, kind, seed=1, **hyper(kind))
    train(backbone, again, data, tmp_path / "broken", accumulate=2, **OPTIONS)
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    assert same(dict(again.state_dict()), dict(whole.state_dict()))
    a, b = states(tmp_path / "broken"), states(tmp_path / "whole")
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert same(a[key], b[key]), key
    assert a["optimizer_states"][0]["state"], "the optimiser has its moments"


class Terminate(Callback):
    """Sends this process SIGTERM after a batch of the validation that belongs to a step."""

    def __init__(self, step: int, batch: int) -> None:
        self.at = (step, batch)
        self.batches = 0

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Counts the batches on the way."""
        self.batches += 1
        if (trainer.global_step, batch_idx) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("every", [4, 1000], ids=["due", "not due"])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_sigterm_in_a_validation_loses_no_step(
    batch: int, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its first batch, in its midst, at its last: the same metrics, brick and early stopping."""
    monkeypatch.setattr("cfm_train.training.fit.evaluation_tokens", lambda device: 4 * 12)
    backbone = tiny("llama")
    data = tasks(backbone)
    options = {**OPTIONS, "checkpoint_every": every, "tokens_per_batch": 12, "patience": 9}
    whole, watch = new_brick(backbone, data, "lora", dropout=0.1), Terminate(-1, -1)
    kept = train(backbone, whole, data, tmp_path / "whole", callbacks=[watch], **options)
    assert watch.batches == 2 * 3, "three batches in each validation"
    with pytest.raises(SystemExit) as caught:
        train(
            backbone,
            new_brick(backbone, data, "lora", dropout=0.1),
            data,
            tmp_path / "broken",
            callbacks=[Terminate(4, batch)],
            **options,
        )
    assert caught.value.code == 143
    assert read_position(tmp_path / "broken" / "checkpoints").step == 4
    validated = [r["step"] for r in rows(tmp_path / "broken") if "validation/loss" in r]
    assert validated == ([4] if batch == 2 else []), "one that is at its end is not broken off"
    again, rest = new_brick(backbone, data, "lora", seed=1, dropout=0.1), Terminate(-1, -1)
    fitted = train(backbone, again, data, tmp_path / "broken", callbacks=[rest], **options)
    assert rest.batches == (3 if batch == 2 else 6), "all of the validation, from its start"
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    assert same(dict(again.state_dict()), dict(whole.state_dict()))
    assert fitted.best_step == kept.best_step and fitted.rows == kept.rows
    a, b = states(tmp_path / "broken"), states(tmp_path / "whole")
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "callbacks"):
        assert same(a[key], b[key]), key


def test_a_checkpoint_holds_the_brick_alone(tmp_path: Path) -> None:
    backbone = tiny("bert")
    data = tasks(backbone)
    brick = new_brick(backbone, data, "lora")
    train(backbone, brick, data, tmp_path / "run", **OPTIONS)
    state = states(tmp_path / "run")
    assert {name.removeprefix("brick.") for name in state["state_dict"]} == set(brick.state_dict())
    file = tmp_path / "run" / "checkpoints" / LAST
    numbers = sum(p.numel() for p in brick.parameters())
    assert file.stat().st_size < 3.2 * 4 * numbers + 2**20
    own = {tuple(p.shape) for p in brick.parameters()}
    moments = state["optimizer_states"][0]["state"].values()
    assert {tuple(m["exp_avg"].shape) for m in moments} == own


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_a_checkpoint_that_does_not_fit_is_refused(change: str, tmp_path: Path) -> None:
    backbone = tiny("bert")
    data = tasks(backbone)
    train(backbone, new_brick(backbone, data, "lora"), data, tmp_path / "run", **OPTIONS)
    state = states(tmp_path / "run")
    state["global_step"] = 6
    name = next(iter(state["state_dict"]))
    if change == "missing":
        del state["state_dict"][name]
    else:
        state["state_dict"]["brick.more"] = torch.zeros(1)
    save_atomically(state, tmp_path / "run" / "checkpoints" / LAST)
    with pytest.raises(
        RuntimeError, match=name.removeprefix("brick.") if change == "missing" else "more"
    ):
        train(backbone, new_brick(backbone, data, "lora"), data, tmp_path / "run", **OPTIONS)


def test_a_run_killed_after_its_last_step_keeps_its_samples(tmp_path: Path) -> None:
    """Nothing is left to train, yet figures, best brick and sample outputs are those of before."""
    backbone = tiny("bert")
    data = tasks(backbone)
    found = []
    for _ in range(2):
        brick = new_brick(backbone, data, "lora")
        wandb = WandbRun("disabled", "p", None, "train", [], {}, tmp_path)
        samples = SampleOutputs(backbone, data, 3, wandb)
        fitted = train(backbone, brick, data, tmp_path / "run", callbacks=[samples], **OPTIONS)
        found.append((samples.latest, brick.state_dict(), fitted.best_step, fitted.rows))
    assert len(found[0][0]) == 3
    assert found[0][0][0]["prediction"] in ("no", "yes")
    assert all(s["right"] is (s["prediction"] == s["reference"]) for s in found[0][0])
    assert same(found[0], found[1])
