"""The dashboard: records drawn into one self-contained HTML file.

The page needs no server, no account and no network: style and scripts are put into it when it is
drawn, its data stands in it as JSON (``<script id="data">``), and its content security policy
forbids it to load anything. Charts are SVG drawn by the page's own script, in the reader's light or
dark.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfm_train.tracking.atomic import replace_file
from cfm_train.tracking.record import validate
from cfm_train.tracking.view import view

_ASSETS = Path(__file__).resolve().parent / "assets"

#: In this order: helpers first, the part that starts everything last.
_SCRIPTS = (
    "base", "headline", "ranking", "matrix", "chart", "tuning", "reasons", "curves", "costs",
    "search", "arms", "lineage", "tables", "main",
)  # fmt: skip


def draw(records: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = "") -> Path:
    """Draws records into a page.

    Args:
        records: records as `read_record` gives them. One that was not read from a file has no
            ``folder``: its curves are then sought beside the page.
        path: the HTML file; written atomically.
        title: heading of the page; the runs' common recipe where it is empty.

    Returns:
        The path written.

    Raises:
        ValueError: a record is not valid.
        UserError: a metrics file is broken.
        OSError: the page cannot be written.
    """
    path = Path(path)
    checked = [validate(record) for record in records]
    title = title or _title(checked)
    data = {"title": title, **view(checked, path.parent)}
    parts = {
        "title": html.escape(title),
        "style": _asset("page.css"),
        "script": "\n".join(_asset(f"{name}.js") for name in _SCRIPTS),
        "data": as_script_json(data),
    }
    # In one pass: nothing that a record says is ever read as a mark.
    page = re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], _asset("page.html"))
    replace_file(path, page.encode())
    return path


def as_script_json(data: Any) -> str:
    """JSON that cannot end the ``<script>`` element around it, whatever the texts in it say."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _title(records: Sequence[Mapping[str, Any]]) -> str:
    """The recipe that all runs have in common, that ran them as its steps, or compares them."""
    whole = [record for record in records if record["operation"] == "sequence"]
    whole = whole or [record for record in records if record.get("comparison")]
    recipes = list(dict.fromkeys(record["recipe"] for record in whole or records))
    if len(recipes) != 1:
        return f"{len(records)} runs"
    name = (whole or records)[0]["name"] if len(whole or records) == 1 else f"{len(records)} runs"
    return recipes[0] if name == recipes[0] else f"{recipes[0]} · {name}"


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
