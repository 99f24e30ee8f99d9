"""What all tests share: the folder with real models and data, and a cache of the tests' own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# One thread per process: tests run side by side, and oversubscribed cores crawl.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("CFM_LIBRARY", None)  # the library of whoever runs the tests stays out of them

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models and data sets beside the checkout; skips where it is absent."""
    folder = ROOT.parent / "shared"
    if not (folder / "models").is_dir():
        pytest.skip("needs real models and data in ../shared, which is absent")
    return folder


@pytest.fixture(autouse=True)
def _the_tiny_backbones_stay() -> Iterator[None]:
    """Tests share loaded backbones: one that leaves a hook or a gradient on them fails itself."""
    yield
    if "tests.backbones" in sys.modules:
        changed = sys.modules["tests.backbones"].what_changed()
        assert not changed, f"this test left the shared tiny backbones changed: {sorted(changed)}"
