"""The arms of a knowledge brick: in the view, in the terminal, and on the page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from demo_records import figure, trained
from drawing import Draw

from cfm_train.tracking.record import Record, validate
from cfm_train.tracking.terminal import print_run
from cfm_train.tracking.view import view

SCORES = {"bare": 0.05, "text": 0.6, "brick": 0.4, "both": 0.65}


def gain(value: float, half: float) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": 250}


def studied(folder: Path) -> Record:
    """A record with arms."""
    arms = [
        {
            "name": name,
            "loss": {"value": 4 - 3 * score, "low": 3.9 - 3 * score, "high": 4.2, "n": 250},
            "token_accuracy": figure(score + 0.1),
            "exact_match": figure(score),
        }
        for name, score in SCORES.items()
    ]
    gains = [
        {
            "arm": one,
            "over": other,
            "loss": gain(-1.05, 0.2),
            "token_accuracy": gain(0.35, 0.1),
            "exact_match": gain(SCORES[one] - SCORES[other], 0.1),
        }
        for one, other in (("brick", "bare"), ("both", "text"), ("brick", "text"))
    ]
    unrelated = {
        "bare_perplexity": {"value": 20.0, "low": 19.0, "high": 21.0, "n": 9},
        "brick_perplexity": {"value": 20.1, "low": 19.0, "high": 21.2, "n": 9},
        "perplexity_ratio": {"value": 1.005, "low": 1.001, "high": 1.009, "n": 9},
    }
    found = {"questions": 250, "made": "by rule", "cut": 3, "arms": arms, "gains": gains}
    return trained(folder, "topic", arms={**found, "unrelated": unrelated})


def test_the_schema_is_strict(tmp_path: Path) -> None:
    record: Any = studied(tmp_path)
    del record["arms"]["arms"][0]["exact_match"]
    assert validate(record)
    record["arms"]["arms"][0]["luck"] = 1
    with pytest.raises(ValueError, match=r"arms.*luck"):
        validate(record)


def test_the_view_has_every_figure_and_says_which_gain_is_clear(tmp_path: Path) -> None:
    record = studied(tmp_path)
    (shown,) = view([record, trained(tmp_path, "intent")], tmp_path)["arms"]
    assert shown["metrics"] == ["loss", "token_accuracy", "exact_match"]
    assert [arm["figures"][2]["value"] for arm in shown["arms"]] == list(SCORES.values())
    assert [row["figures"][2]["clear"] for row in shown["gains"]] == [True, False, True]
    assert shown["gains"][1]["name"] == "text and brick − text in the prompt"
    assert view([trained(tmp_path, "sentiment")], tmp_path)["arms"] == []


def test_the_terminal_prints_the_arms(tmp_path: Path) -> None:
    said = io.StringIO()
    print_run(studied(tmp_path), file=said)
    lines = {line.split("  ")[0].strip(): line for line in said.getvalue().splitlines()}
    assert "40.0" in lines["brick"] and "60.0" in lines["text in the prompt"]
    assert "-20.0  -30.0 to -10.0" in lines["brick − text in the prompt"]
    assert "perplexity × 1.00" in said.getvalue() or "perplexity × 1.01" in said.getvalue()


def test_the_page_shows_the_figures_of_the_record(
    browser: Browser, drawn: Draw, tmp_path: Path
) -> None:
    record: Any = studied(tmp_path)
    page, _ = drawn([record])
    browser.open(page, width=1280)
    table = browser.run(
        """[...document.querySelectorAll("#arms tbody tr")].map((row) =>
          [row.cells[0].textContent,
           ...[...row.querySelectorAll("td")].map((c) => +c.dataset.value)])"""
    )
    held = [*record["arms"]["arms"], *record["arms"]["gains"]]
    assert [row[1:] for row in table] == [
        [one[m]["value"] for m in ("loss", "token_accuracy", "exact_match")] for one in held
    ]
    assert [row[0] for row in table][:2] == ["bare backbone", "text in the prompt"]
    said = browser.run("document.querySelector('#arms p:last-child').textContent")
    assert "250 questions, by rule · 3 passages cut" in said and "× 1.005" in said
    assert not browser.messages
