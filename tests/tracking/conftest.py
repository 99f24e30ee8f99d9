"""A browser for all tests of what is drawn, and a way to draw."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, find_chromium
from drawing import Draw, data_in

from cfm_train.tracking.dashboard import draw
from cfm_train.tracking.record import Record


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("needs a Chromium (Debian: apt-get install chromium)")
    browser = Browser(program)
    yield browser
    browser.close()


@pytest.fixture
def drawn(tmp_path: Path) -> Draw:
    """Draws records beside their runs; gives the page and the data in it."""

    def drawn(records: list[Record], **options: str) -> tuple[Path, dict]:
        page = draw(records, tmp_path / "dashboard.html", **options)
        return page, data_in(page)

    return drawn
