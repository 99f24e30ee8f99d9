"""Figures on the page in a real browser: they are the records', with rings, heads and seeds."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import Browser
from demo_records import TASKS, cell, figure, quickstart, trained
from demo_sets import many
from drawing import Draw


def test_figures_on_the_page_are_the_records(browser: Browser, drawn: Draw, tmp_path: Path) -> None:
    records = quickstart(tmp_path)
    page, _ = drawn(records, title="Four bricks")
    browser.open(page, width=1280)
    table = browser.run(
        """[...document.querySelectorAll(".heat tbody tr:not(.group)")].map((row) =>
          [row.cells[0].textContent, ...[...row.querySelectorAll("td:not(.mean)")].map((cell) =>
            [+cell.dataset.value, +cell.dataset.low, +cell.dataset.high,
             cell.querySelector("b").textContent, cell.querySelector("small").textContent])])"""
    )
    shown = {(row[0], task): row[1 + at] for row in table for at, task in enumerate(TASKS)}
    cells = [c for record in records for c in record["matrix"]]
    assert len(shown) == len(cells) == 18
    for c in cells:
        text = f"{100 * c['value']:.1f}", f"{100 * c['low']:.1f}–{100 * c['high']:.1f}"
        assert shown[c["brick"], c["task"]] == [c["value"], c["low"], c["high"], *text]
    best = browser.run(
        "[...document.querySelectorAll('.heat td.best')].map((c) => Number(c.dataset.value))"
    )
    assert sorted(best) == sorted(value for value, _ in TASKS.values())
    scores = browser.run(
        "[...document.querySelectorAll('#runs b[data-value]')].map((b) => +b.dataset.value)"
    )
    assert scores == [record["metrics"]["test/accuracy"]["value"] for record in records[:3]]
    big = browser.run("Number(document.querySelector('.big b').dataset.value)")
    assert big == pytest.approx((0.885 + 0.861 + 0.835) / 3)
    assert browser.run("document.querySelector('.winner').textContent") == records[3]["name"] + (
        "(sentiment, topic)"
    )
    assert browser.run("document.querySelector('#checks .verdict').textContent") == (
        "All 4 checks passed"
    )
    assert browser.run("document.title") == "Four bricks"


def test_the_mean_over_seeds_wins_and_says_so(
    browser: Browser, drawn: Draw, tmp_path: Path
) -> None:
    """The ring is on the mean; its interval and its count are those of the seeds."""
    records = [
        trained(tmp_path, "topic", name=name, seed=seed, seedless_hash=name * 4)
        for name in ("one", "two")
        for seed in (1, 2, 3)
    ]
    for record in records[3:]:
        record["matrix"][0]["value"] -= 0.03
    page, data = drawn(records)
    browser.open(page, width=1280)
    found = browser.run(
        "[...document.querySelectorAll('.heat tr')].filter((row) => row.querySelector('td.best'))"
        ".map((row) => row.querySelector('th').textContent)"
    )
    assert found == ["onemean of 3 seeds"]
    assert browser.run("document.querySelector('#headline .winner').textContent") == (
        "one · mean of 3 seeds"
    )
    text = browser.run("document.querySelector('#headline').textContent")
    assert "Winner of 2" in text and "3 seeds" in text and "test examples" not in text
    figure = data["matrix"]["rows"][0]["cells"][0]
    assert figure["value"] == pytest.approx(0.9) and figure["n"] == 3
    assert figure["high"] - figure["value"] == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-4)


def test_all_that_are_equally_good_are_ringed(
    browser: Browser, drawn: Draw, tmp_path: Path
) -> None:
    """A tie has no first; a bound cannot win, so it has no ring, however good."""
    records = [trained(tmp_path, "topic", name=name) for name in ("one", "two")]
    records.append(trained(tmp_path, "topic", name="three"))
    records[2]["matrix"][0] |= figure(0.8)
    records[2]["matrix"].append(cell("multitask", "topic", 0.88, "ceiling"))
    page, data = drawn(records)
    browser.open(page, width=1280)
    ringed = browser.run(
        "[...document.querySelectorAll('.heat tr')].filter((row) => row.querySelector('td.best'))"
        ".map((row) => row.querySelector('th').textContent)"
    )
    assert ringed == ["one", "two"]
    values = [row["cells"][0]["value"] for row in data["matrix"]["rows"]]
    assert values == [0.88, 0.88, 0.8, 0.88, TASKS["topic"][1]]
    tips = []
    for at in range(5):
        cell_at = f"document.querySelectorAll('.heat tbody td[tabindex]')[{at}]"
        browser.run(f"{cell_at}.dispatchEvent(new PointerEvent('pointermove', {{bubbles: true}}))")
        tips.append("best of the column" in browser.run("document.querySelector('#tip').innerText"))
    assert tips == [True, True, False, False, False]


def test_a_cell_names_whose_head_answered(browser: Browser, drawn: Draw, tmp_path: Path) -> None:
    """A small mark with its legend, and the name in the cell's tooltip."""
    page, data = drawn(quickstart(tmp_path))
    browser.open(page, width=1280)
    first = data["matrix"]["rows"][0]
    assert [cell["head"] for cell in first["cells"]] == list(TASKS)
    marks = browser.run("[...document.querySelectorAll('.heat sup')].length")
    assert marks == len(TASKS) * (len(TASKS) - 1)
    assert browser.run("document.querySelector('.key .borrowed').textContent").startswith("†")
    told = []
    for at in (0, 1):
        cell = f"document.querySelectorAll('.heat tbody td[tabindex]')[{at}]"
        browser.run(f"{cell}.dispatchEvent(new PointerEvent('pointermove', {{bubbles: true}}))")
        told.append(browser.run("document.getElementById('tip').textContent"))
    own, other = list(TASKS)[:2]
    assert "headits own" in told[0] and f"headthat of {other}" in told[1], (own, told)


def test_only_answers_that_can_be_right_are_marked(
    browser: Browser, drawn: Draw, tmp_path: Path
) -> None:
    """A label is right or wrong; a text that goes on otherwise is neither."""
    record = trained(tmp_path, "topic")
    said = {"input": "x", "prediction": "a"}
    record["samples"] = [
        {**said, "reference": "a", "right": True},
        {**said, "reference": "b", "right": False},
        {**said, "reference": "b", "right": None},
        {**said, "reference": "b"},
    ]
    page, _ = drawn([record])
    browser.open(page, width=1280)
    texts = browser.run(
        "[...document.querySelectorAll('.sample:not(.sample-head) > div:nth-child(2) p')]"
        ".map((each) => each.textContent)"
    )
    assert texts == ["✓ a", "✗ a", "a", "a"]


def test_failures_come_first_and_are_named(browser: Browser, drawn: Draw, tmp_path: Path) -> None:
    record = trained(tmp_path, "topic")
    record["checks"]["unplugged equals bare"] = {
        "value": 3.1e-4,
        "tolerance": 1e-5,
        "passed": False,
    }
    page, _ = drawn([record, many(tmp_path)[-1]])
    browser.open(page, width=1280)
    assert browser.run("document.querySelector('#checks .verdict').textContent") == (
        "1 of 2 runs failed, 1 of 2 checks failed"
    )
    assert browser.run("document.querySelector('#checks details').open") is True
    lines = browser.run("[...document.querySelectorAll('#checks li')].map((li) => li.textContent)")
    assert lines[0] == "✗x: the loss became NaN at step 41"
    assert lines[1] == "✗topic: unplugged equals bare (0.00031, tolerance 1.0e-5)"
