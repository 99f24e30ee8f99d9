"""metrics.jsonl: every row that was logged, none torn, cut back to the checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cfm_train.errors import UserError
from cfm_train.tracking.metrics_file import MetricsFile

ROOT = Path(__file__).resolve().parents[2]


def test_rows_come_back_with_numbers_of_any_kind(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.rows() == []
    file.append(1, {"a": 0.1, "b": np.float32(0.5), "c": torch.tensor(2), "d": "x\ny", "e": None})
    file.append(2, {"a": True})
    assert file.rows() == [
        {"step": 1, "a": 0.1, "b": 0.5, "c": 2, "d": "x\ny", "e": None},
        {"step": 2, "a": True},
    ]
    assert len(file.path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"loss": float("nan")}, "loss: nan cannot be logged"),
        ({"loss": torch.tensor(float("inf"))}, "loss: inf cannot be logged"),
        ({"loss": [1.0]}, "loss: a list is not a scalar"),
        ({"step": 3}, "step: is given beside"),
    ],
)
def test_what_is_no_figure_is_refused_and_leaves_nothing(
    tmp_path: Path, values: dict, sentence: str
) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=sentence):
        file.append(1, {"fine": 1.0, **values})
    assert not file.path.exists()


def test_cut_back_drops_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.cut_back(0) == 0 and not file.path.exists()
    for step in (1, 2, 2, 3, 4):
        file.append(step, {"loss": 1 / step})
    with file.path.open("ab") as raw:
        raw.write(b'{"step": 5, "lo')
    assert len(file.rows()) == 5
    assert file.cut_back(2) == 2
    assert [row["step"] for row in file.rows()] == [1, 2, 2]
    file.append(3, {"loss": 0.5})
    assert file.path.read_bytes().endswith(b'{"step": 3, "loss": 0.5}\n')
    assert [json.loads(line)["step"] for line in file.path.open()] == [1, 2, 2, 3]
    assert list(tmp_path.iterdir()) == [file.path]


@pytest.mark.parametrize("line", ["{", "[1]", '"x"', "5", '{"loss": 1}', '{"step": "1"}', ""])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a row of metrics"):
        MetricsFile(path).rows()


def test_a_kill_loses_no_row_that_was_logged(tmp_path: Path) -> None:
    script = """
import sys
from cfm_train.tracking.metrics_file import MetricsFile
file = MetricsFile(sys.argv[1])
for step in range(10**9):
    file.append(step, {"train/loss": 1.5, "note": "x" * 3000})
    print(step, flush=True)
"""
    path = tmp_path / "metrics.jsonl"
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    while not path.exists():
        time.sleep(0.01)
    time.sleep(0.1)
    child.kill()
    said = [line for line in child.communicate()[0].split("\n")[:-1] if line]
    steps = [row["step"] for row in MetricsFile(path).rows()]
    assert steps == list(range(len(steps)))
    assert len(steps) >= len(said) > 0
