"""A library of its own for every test, and small real bricks to put into it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from cfm_train.library.card import Card
from cfm_train.library.store import Library


class Bricks:
    """Makes bricks that differ by their seed."""

    @staticmethod
    def files(seed: int = 0) -> dict[str, bytes]:
        values = np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32)
        return {"brick.safetensors": save({"up": values, "down": values.T.copy()})}

    @staticmethod
    def card(name: str = "sst2", **known: object) -> Card:
        return Card(name=name, kind="lora", operation="train", **known)  # type: ignore[arg-type]

    def add(self, library: Library, seed: int = 0, name: str = "sst2", **known: object) -> Card:
        return library.add(self.files(seed), self.card(name, **known))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of far libraries go to the test's own folder."""
    monkeypatch.setenv("CFM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bricks() -> Bricks:
    return Bricks()


@pytest.fixture(params=["folder", "memory"])
def library(request: pytest.FixtureRequest, tmp_path: Path) -> Library:
    """A new library, once in a local folder and once behind fsspec."""
    if request.param == "folder":
        return Library(tmp_path / "library")
    return Library(f"memory://{tmp_path.name}/library")


@pytest.fixture
def local(tmp_path: Path) -> Library:
    """A new library in a local folder."""
    return Library(tmp_path / "library")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content, to see whether anything has changed."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def snapshot():  # type: ignore[no-untyped-def]
    return tree
