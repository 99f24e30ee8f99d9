"""The table of bricks and families in docs/bricks.md is what is measured here.

``CFM_WRITE_DOCS=1 pytest tests/bricks/test_kinds_table.py`` writes it anew.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from tests.backbones import FAMILIES
from tests.conftest import ROOT
from tests.kinds_table import END, START, Cell, draw, measure, names

PAGE = ROOT / "docs" / "bricks.md"


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the cells are kept, for all processes that share this run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kinds"
    folder.mkdir(exist_ok=True)
    return folder


def cell(name: str, family: str, measured: Path) -> Cell:
    """A cell, measured once in a run."""
    file = measured / f"{name}-{family}.json"
    if file.is_file():
        kept = json.loads(file.read_text())
        return Cell(**{**kept, "identity": tuple(kept["identity"])})
    found = measure(name, family)
    beside = file.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(dataclasses.asdict(found)))
    beside.replace(file)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", names())
def test_unplugging_is_exact(name: str, family: str, measured: Path) -> None:
    found = cell(name, family, measured)
    assert found.refused is not None or found.exact


def test_the_page_holds_what_is_measured(measured: Path) -> None:
    drawn = draw({(n, f): cell(n, f, measured) for n in names() for f in FAMILIES})
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    if os.environ.get("CFM_WRITE_DOCS"):
        PAGE.write_text(before + drawn + after, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == before + drawn + after, (
        "docs/bricks.md is not what is measured: run CFM_WRITE_DOCS=1 pytest "
        "tests/bricks/test_kinds_table.py and look at what has changed"
    )
