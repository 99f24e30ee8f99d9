"""A run on documents that is SIGKILLed at any moment ends as the unbroken one does, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cfm_train.library.store import Library
from tests.backbones import folder
from tests.conftest import ROOT
from tests.knowledge.handbooks import command, text
from tests.training.test_killed import check_library, curve, finish, has_rows, kill_when

STEPS = 12


def start(place: Path, *more: str) -> subprocess.Popen[str]:
    """Distils a document into a cartridge, held close on other text, in a process of its own."""
    place.mkdir(exist_ok=True)
    (place / "other.txt").write_text(text(30, seed=7))
    given = command(place, folder("llama"), "cartridge", "objective.keep=0.5")
    given += ["data.unrelated=other.txt", f"trainer.max_steps={STEPS}", "trainer.accumulate=2"]
    given += ["trainer.validate_every=4", "trainer.checkpoint_every=3", "trainer.threads=1"]
    return subprocess.Popen(
        [sys.executable, "-m", "cfm_train", *given, "trainer.tokens_per_batch=128", *more],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def record_of(place: Path) -> dict[str, Any]:
    """The one run's record."""
    (file,) = (place / "outputs" / "runs").glob("*/*/record.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.slow
def test_kills_in_a_distillation_change_nothing(tmp_path: Path) -> None:
    """In the first steps, between two checkpoints, while it asks its questions."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(whole))
    expected = curve(whole / "outputs")
    assert len(expected) == STEPS + STEPS // 4
    for rows, wait in ((2, 0.0), (7, 0.01), (len(expected), 0.1)):
        process = start(broken)
        assert kill_when(process, partial(has_rows, broken / "outputs", rows, wait))
        check_library(broken / "outputs")
    finish(start(broken))
    assert curve(broken / "outputs") == expected
    brick, other = (Library(p / "outputs" / "library").find("handbook") for p in (broken, whole))
    assert brick.version == other.version
    a, b = record_of(broken), record_of(whole)
    assert all(check["passed"] for check in a["checks"].values())
    for key in ("metrics", "arms", "matrix", "samples", "data"):
        assert a[key] == b[key], key
