"""Images in three colours with the word for each, and a run of a command in this process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfm_train.launch.cli import main

COLOURS = {"w5": (255, 0, 0), "w6": (0, 255, 0), "w7": (0, 0, 255)}
ALIGN = [
    "recipe=modality/align",
    "name=eyes",
    "backbone=hf",
    "encoder=patches",
    "encoder.size=16",
    "connector.tokens=1",
    "data.items=items.jsonl",
    "data.test_fraction=0.3",
    "trainer.precision=float32",
    "trainer.samples=1",
    "evaluation.bootstrap=20",
    "tracking=disabled",
]


def image(word: str, draw: np.random.Generator) -> np.ndarray:
    """An image in the colour of a word, with noise."""
    base = np.zeros((16, 16, 3), np.uint8) + np.array(COLOURS[word], np.uint8) // 2
    return base + draw.integers(0, 60, (16, 16, 3)).astype(np.uint8)


@pytest.fixture
def items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Thirty images with the word for their colour, and a cache of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CFM_CACHE", str(tmp_path / "cache"))
    draw, rows = np.random.default_rng(0), []
    (tmp_path / "img").mkdir()
    for i in range(30):
        word = random.Random(i).choice(list(COLOURS))
        np.save(f"img/{i}.npy", image(word, draw))
        rows.append(json.dumps({"image": f"img/{i}.npy", "text": word}))
    (tmp_path / "items.jsonl").write_text("\n".join(rows))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    """A command in this process: its record, and what it printed."""
    code = main(list(arguments))
    out = capsys.readouterr()
    assert code == 0, out.err[-3000:]
    record = Path(out.out.splitlines()[-1].removeprefix("record: "))
    return json.loads(record.read_text()), out.out
