"""Real runs that take seconds: two steps on sentences that the project ships."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cfm_train.launch.cli import main

#: A run as short as it can be; every test adds what it is about.
SHORT = [
    "recipe=task/quick_tone",
    "data.limit=32",
    "trainer.max_steps=2",
    "trainer.rows_per_batch=8",
    "trainer.samples=0",
    "evaluation.bootstrap=50",
    "tracking=disabled",
]


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def record(self) -> dict[str, Any]:
        """The record that the last line of standard output names."""
        last = self.out.splitlines()[-1]
        assert last.startswith("record: ")
        return json.loads(Path(last.removeprefix("record: ")).read_text())

    @property
    def folder(self) -> Path:
        """The run's folder; the last two lines of standard output agree on it."""
        dashboard, record = self.out.splitlines()[-2:]
        found = Path(record.removeprefix("record: ")).parent
        assert dashboard == f"dashboard: {found / 'dashboard.html'}"
        assert (found / "dashboard.html").is_file()
        return found


Command = Callable[..., Ended]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Runs a command in this process, standing in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CFM_LIBRARY", raising=False)

    def run(*arguments: str) -> Ended:
        capsys.readouterr()
        code = main([*SHORT, *arguments])
        return Ended(code, *capsys.readouterr())

    return run
