"""Draws records into one self-contained HTML file."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfm_train.tracking.atomic import replace_file


def draw(
    records: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = "cfm_train"
) -> Path:
    """Writes the dashboard of some records."""
    path = Path(path)
    data = json.dumps(list(records)).replace("<", "\\u003c")
    page = f'<!doctype html><title>{html.escape(title)}</title><script type="application/json">{data}</script>'
    replace_file(path, page.encode())
    return path
