"""What a person does on the page, in a real browser: choose, hide, sort, follow, go by keys."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import Browser
from demo_records import TASKS, quickstart, trained
from drawing import Draw


def test_cost_chart_shows_what_is_chosen(browser: Browser, drawn: Draw, tmp_path: Path) -> None:
    records = quickstart(tmp_path)
    page, _ = drawn(records)
    browser.open(page, width=1280)
    marks = """[...document.querySelectorAll('#costs g[data-cost]')].map((mark) =>
      [+mark.dataset.cost, +mark.dataset.value])"""
    choose = """(([cost, quality]) => { const [a, b] = document.querySelectorAll("#costs select");
      a.value = cost; b.value = quality; a.dispatchEvent(new Event("change")); })"""
    for key in ("trainable_parameters", "seconds", "peak_memory_bytes", "train_seconds"):
        for at, task in enumerate(TASKS):
            browser.run(f"{choose}(['{key}', '{at}'])")
            expected = [
                [record["cost"][key], c["value"]]
                for record in records
                for c in record["matrix"]
                if c["task"] == task and c["role"] in ("brick", "merged")
                if record["cost"][key] is not None
            ]
            assert sorted(browser.run(marks)) == sorted(expected)
    browser.run(f"{choose}(['seconds', 'gain'])")
    gains = {c["task"]: c["value"] - TASKS[c["task"]][1] for c in records[3]["matrix"][:3]}
    assert [2.5, pytest.approx(sum(gains.values()) / 3)] in browser.run(marks)


def test_curves_hide_and_show_runs(browser: Browser, drawn: Draw, tmp_path: Path) -> None:
    page, data = drawn(quickstart(tmp_path))
    browser.open(page, width=1280)
    strokes = """new Set([...document.querySelectorAll('#curves .chart path')].map((path) =>
      path.getAttribute('stroke'))).size"""
    assert [curve["key"] for curve in data["curves"]] == [
        "train/loss", "train/learning_rate", "validation/accuracy",
    ]  # fmt: skip
    assert browser.run(strokes) == 3
    browser.run("document.querySelector('#curves .legend button').click()")
    assert browser.run(strokes) == 2
    pressed = "document.querySelector('#curves .legend button').getAttribute('aria-pressed')"
    assert browser.run(pressed) == "false"


def test_everything_works_from_the_keyboard(browser: Browser, drawn: Draw, tmp_path: Path) -> None:
    page, _ = drawn(quickstart(tmp_path))
    browser.open(page, width=1280)
    value = "document.activeElement.dataset.value"
    tip = (
        "document.getElementById('tip').hidden ? null : document.getElementById('tip').textContent"
    )
    for _ in range(20):  # past the links at the top and the checks, into the matrix
        browser.key("Tab")
        if browser.run(value):
            break
    assert float(browser.run(value)) == 0.91
    assert "sentiment on sentiment" in browser.run(tip)
    browser.key("ArrowRight")
    assert float(browser.run(value)) == pytest.approx(TASKS["topic"][1] - 0.03)
    browser.key("ArrowDown")
    assert float(browser.run(value)) == 0.88
    assert "topic on topic" in browser.run(tip)
    browser.key("Tab")  # one stop for the whole table
    assert browser.run("document.activeElement.tagName") == "SELECT"
    stops = set()
    for _ in range(40):
        browser.key("Tab")
        stops.add(browser.run("document.activeElement.closest('section')?.id ?? ''"))
    assert {"costs", "curves", "lineage", "runs"} <= stops


def test_curve_tells_its_values_at_a_step(browser: Browser, drawn: Draw, tmp_path: Path) -> None:
    page, _ = drawn([trained(tmp_path, "topic")])
    browser.open(page, width=1280)
    browser.run("document.querySelectorAll('#curves .chart svg')[2].focus()")
    browser.key("ArrowLeft")
    text = browser.run("document.getElementById('tip').textContent")
    assert text == f"step 50topic{0.88 - 0.3 * 2.718281828459045 ** (-50 / 15):.4g}"


def test_runs_can_be_sorted_and_lead_to_their_files(
    browser: Browser, drawn: Draw, tmp_path: Path
) -> None:
    page, _ = drawn(quickstart(tmp_path))
    browser.open(page, width=1280)
    names = "[...document.querySelectorAll('#runs td:first-child b')].map((b) => b.textContent)"
    assert browser.run(names) == [*TASKS, "average"]
    browser.run("document.querySelectorAll('#runs th button')[4].click()")  # by score
    assert browser.run(names) == ["intent", "sentiment", "topic", "average"]
    links = browser.run(
        "[...document.querySelectorAll('#runs a, #lineage a')].map((a) => a.getAttribute('href'))"
    )
    assert len(links) == 12
    for link in links:
        assert not link.startswith("/")
        assert (page.parent / link).is_file(), link
