"""Pages as tests draw them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

Draw = Callable[..., tuple[Path, dict]]


def data_in(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])
