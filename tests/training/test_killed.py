"""A run that is killed at any moment ends as the unbroken one does, bit for bit.

Real processes, real SIGKILLs: at random progress, in mid-accumulation, and while a checkpoint is
written.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from cfm_train.library.store import Library

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24


def command(folder: Path, *more: str) -> list[str]:
    """A short training run on the project's own sentences, float32, two micro-batches a step."""
    data = ROOT / "cfm_train" / "data" / "quickstart"
    return [
        sys.executable,
        "-m",
        "cfm_train",
        "recipe=task/classify",
        "name=killed",
        f"data.train={data}/tense.train.jsonl",
        f"data.test={data}/tense.test.jsonl",
        "brick=lora",
        "brick.dropout=0.1",
        "trainer.precision=float32",
        f"trainer.max_steps={STEPS}",
        "trainer.tokens_per_batch=128",
        "trainer.accumulate=2",
        "trainer.validate_every=8",
        "trainer.checkpoint_every=3",
        "trainer.threads=1",
        "trainer.samples=2",
        "tracking.mode=disabled",
        f"outputs={folder}",
        f"library={folder}/library",
        *more,
    ]


def curve(folder: Path) -> list[dict[str, float]]:
    """The run's metrics rows, exactly as written."""
    files = list(folder.glob("runs/*/*/metrics.jsonl"))
    if not files:
        return []
    lines = files[0].read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    """Starts the run in a process group of its own."""
    return subprocess.Popen(
        command(folder, *more),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Waits for a run that is left alone, and returns its standard output."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return out


def kill_when(
    process: subprocess.Popen[str], reached: Callable[[], bool], patience: float = 300
) -> bool:
    """SIGKILLs the process as soon as ``reached()`` is true; False if it ended before."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if process.poll() is not None:
            return False
        if reached():
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.002)
    raise AssertionError("the run made no progress")


def has_rows(folder: Path, count: int, wait: float) -> bool:
    """Whether the run has written so many rows; waits a little longer where it has."""
    if len(curve(folder)) < count:
        return False
    time.sleep(wait)
    return True


def check_library(folder: Path) -> None:
    """Nothing half-written: every artifact that can be seen verifies."""
    library = Library(folder / "library")
    assert not [problem for name in library.names() for problem in library.verify(name)]


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    """Ten SIGKILLs in one run: loss curve and brick equal those of the run that nobody touched."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(whole))
    expected = curve(whole)
    assert len(expected) == STEPS + STEPS // 8

    draw = random.Random(7)
    kills, reached = 0, 0
    while kills < 10:
        process = start(broken)
        if kills % 3 == 2:  # while a checkpoint is being written
            done = kill_when(process, lambda: any(broken.glob("runs/*/*/checkpoints/.*.tmp")))
        else:  # after some more rows, and a little later: somewhere in a step
            aim = min(reached + draw.randint(1, 2), len(expected) - 1)  # ten must fit into the run
            done = kill_when(process, partial(has_rows, broken, aim, draw.uniform(0, 0.05)))
        check_library(broken)
        if not done:
            break
        kills += 1
        reached = len(curve(broken))
    out = finish(start(broken))
    assert kills == 10
    assert curve(broken) == expected
    assert Library(broken / "library").find("killed").version == (
        Library(whole / "library").find("killed").version
    )
    lines = out.strip().splitlines()
    assert lines[-2].startswith("dashboard: ") and lines[-1].startswith("record: ")
    record = json.loads(Path(lines[-1].removeprefix("record: ")).read_text())
    assert record["status"] == "done" and record["backbone"]["unchanged"]
    check_library(broken)
    assert not list((broken / "runs").glob("*/*/checkpoints/*.tmp"))


@pytest.mark.slow
def test_sigterm_saves_at_once(tmp_path: Path) -> None:
    """SIGTERM leaves a checkpoint of the very step, and the same command goes on from it."""
    process = start(tmp_path, "trainer.checkpoint_every=1000")
    until = time.monotonic() + 300
    while len(curve(tmp_path)) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err[-2000:]
    (checkpoint,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    assert state["global_step"] == curve(tmp_path)[-1]["step"] >= 3
    finish(start(tmp_path, "trainer.checkpoint_every=1000"))
    steps = [row["step"] for row in curve(tmp_path) if "train/loss" in row]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_checkpoint_holds_the_brick_alone(tmp_path: Path) -> None:
    """At most 3.2 times the trained numbers in float32, plus 1 MB; tensors and values alone."""
    finish(start(tmp_path))
    (checkpoint,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    trained = sum(value.numel() for value in state["state_dict"].values())
    (record,) = tmp_path.glob("runs/*/*/record.json")
    assert json.loads(record.read_text())["cost"]["trainable_parameters"] == trained
    assert checkpoint.stat().st_size <= 3.2 * 4 * trained + 2**20
