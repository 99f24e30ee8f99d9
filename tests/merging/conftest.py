"""Fixtures of the tests of whole models."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.merging.whole_models import drawn, write


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base and three models made from it, bfloat16."""
    return [write(tmp_path / f"m{number}", drawn(number)) for number in range(4)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and pieces so small that every tensor has many, and no size divides another."""
    from cfm_train.merging.models import files, streaming

    monkeypatch.setattr(files, "CHUNK", 100)
    monkeypatch.setattr(streaming, "CHUNK", 100)
    monkeypatch.setattr(streaming, "PIECE", 300)
