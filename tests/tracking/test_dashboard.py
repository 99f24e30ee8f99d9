"""The dashboard in a real browser: one file that reads well and loads nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from browser import Browser
from demo_records import compared, quickstart, trained
from demo_sets import SETS
from drawing import Draw

from cfm_train.tracking.dashboard import as_script_json, draw
from cfm_train.tracking.record import new_record

PROBES = (Path(__file__).parent / "probes.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", SETS)
def test_page_reads_well_and_loads_nothing(
    browser: Browser, drawn: Draw, tmp_path: Path, name: str, width: int, dark: bool
) -> None:
    page, _ = drawn(SETS[name](tmp_path))
    browser.open(page, width=width, dark=dark)
    assert browser.messages == []
    assert browser.run("document.documentElement.dataset.drawn") == "yes"
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
    browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    browser.run("new Promise((ok) => requestAnimationFrame(() => setTimeout(ok, 100)))")
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.run(overflow) == 0, "the page scrolls sideways"
    browser.run(PROBES + ";null")
    for probe in ("overlaps", "outside", "spills", "faint"):
        assert browser.run(f"window.{probe}()") == [], probe
    assert browser.messages == []


def test_hostile_texts_stay_texts(browser: Browser, drawn: Draw, tmp_path: Path) -> None:
    evil = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    record = trained(tmp_path, "topic", name="plain")
    record["name"] = evil
    record["samples"] = [
        {"input": evil + "{{style}} &amp; \u2028 €", "prediction": evil, "reference": "{{data}}"}
    ]
    record["checks"] = {evil: {"value": "<b>", "tolerance": None, "passed": False}}
    page, data = drawn([record, trained(tmp_path, "intent")], title=evil)
    browser.open(page, width=390)
    assert browser.run("window.hacked ?? null") is None
    assert browser.messages == []
    assert browser.run("document.querySelector('h1').textContent") == evil
    assert browser.run("document.querySelector('.sample .said p').textContent") == (
        evil + "{{style}} &amp; \u2028 €"
    )
    assert data["samples"][0]["reference"] == "{{data}}"
    assert browser.run("document.documentElement.scrollWidth") == 390


def test_page_is_one_file_without_addresses(drawn: Draw, tmp_path: Path) -> None:
    page, _ = drawn(quickstart(tmp_path))
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert not re.findall(r"<(?:link|script|img)[^>]*(?:src|href)=\"(?!data:)", text)
    assert not re.findall(r"\{\{\w+\}\}", text)
    assert "default-src 'none'" in text


def test_title_is_what_the_runs_have_in_common(drawn: Draw, tmp_path: Path) -> None:
    one, two = trained(tmp_path, "topic"), trained(tmp_path, "topic", seed=1)
    whole = new_record(
        operation="sequence", recipe="quickstart", name="quickstart", seed=0, config_hash="s"
    )
    found = compared(tmp_path / "compared")
    sets = ([one], [one, two], [whole, one], [], found)
    titles = [drawn(records)[1]["title"] for records in sets]
    assert titles == ["task/topic · topic", "task/topic · 2 runs", "quickstart", "0 runs",
                      "compare/bricks · compared"]  # fmt: skip


def test_script_json_is_json_and_cannot_end_its_element() -> None:
    data = {"a": "</SCRIPT><!-- <script>", "b": "\u2028\u2029 & é", "c": [1.5, None, True]}
    text = as_script_json(data)
    assert json.loads(text) == data
    assert not set("<>&\u2028\u2029") & set(text)


def test_an_invalid_record_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="operation"):
        draw([{"recipe": "x"}], tmp_path / "dashboard.html")
    assert not list(tmp_path.iterdir())
