"""The tables at the end of a run: their figures, on a terminal and in a pipe."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from demo_records import TASKS, cell, figure, quickstart, trained

from cfm_train.tracking.terminal import cost_text, print_matrix, print_run, score_text


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_matrix_in_a_pipe_is_plain_and_complete(tmp_path: Path) -> None:
    records = quickstart(tmp_path)
    cells = [c for record in records for c in record["matrix"]]
    out = io.StringIO()
    print_matrix(cells, file=out)
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue() and "│" not in out.getvalue()
    assert lines[0].split() == list(TASKS)
    assert len(lines) == 2 + 6 + 1 and lines[-1].strip() == "* best of its column"
    for c in cells:
        (line,) = [line for line in lines if line.startswith(f"{c['brick']} ")]
        at = 2 * list(TASKS).index(c["task"])
        words = line.removeprefix(c["brick"]).replace("(upper bound)", "")
        words = words.replace("(lower bound)", "").split()
        value, interval = words[at : at + 2]
        assert value.lstrip("*") == f"{100 * c['value']:.1f}"
        assert interval == f"{100 * c['low']:.1f}–{100 * c['high']:.1f}"
        assert value.startswith("*") == (c["brick"] == c["task"])


def test_winner_is_bold_and_intervals_dim_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    out = Terminal()
    cells = [cell("a", "x", 0.8, "brick"), cell("b", "x", 0.7, "merged")]
    print_matrix(cells, file=out)
    a = figure(0.8)
    assert (
        f"\x1b[1m80.0\x1b[0m\x1b[2m  {100 * a['low']:.1f}–{100 * a['high']:.1f}" in out.getvalue()
    )
    assert "\x1b[1m70.0" not in out.getvalue()


def test_equals_are_all_marked_and_a_row_without_rivals_is_not() -> None:
    scores = {"a": (0.8, 0.6), "b": (0.8, None), "c": (0.7, None)}
    cells = [
        cell(name, task, value, "brick")
        for name, values in scores.items()
        for task, value in zip("xy", values, strict=True)
        if value is not None
    ]
    out = io.StringIO()
    print_matrix([*cells, cell("bound", "x", 0.8, "floor")], file=out)
    text = out.getvalue()
    assert text.count("*80.0") == 2 and text.count("80.0 ") == 3
    assert "*60.0" not in text and "*70.0" not in text and "* best of its column" in text


def test_losses_stand_as_they_are_and_the_lowest_wins() -> None:
    out = io.StringIO()
    cells = [cell(name, "x", value, "brick", "loss") for name, value in (("a", 0.71), ("b", 0.62))]
    print_matrix(cells, file=out)
    assert "*0.62" in out.getvalue() and "*0.71" not in out.getvalue()
    figures = {
        0.0: "0.00",
        0.0123: "0.0123",
        2.0: "2.00",
        12.345: "12.3",
        123.4: "123",
        1e304: "1.00e+304",
    }
    assert {value: score_text(value, "perplexity") for value in figures} == figures
    assert score_text(16416.0, "bytes_per_fact") == "16416"
    assert score_text(1.36, "seconds_per_fact") == "1.36"


def test_many_tasks_fit_a_pipe_in_one_line_each() -> None:
    out = io.StringIO()
    print_matrix([cell("a", f"task_number_{i}", 0.5, "brick") for i in range(20)], file=out)
    assert len(out.getvalue().splitlines()) == 3


def test_no_cells_print_nothing() -> None:
    out = io.StringIO()
    print_matrix([], file=out)
    assert out.getvalue() == ""


def test_many_figures_give_way_to_the_matrix(tmp_path: Path) -> None:
    record = quickstart(tmp_path)[3]
    record["metrics"] = {f"a: test/{task}/{m}": figure(0.5) for task in TASKS for m in "abcde"}
    out = io.StringIO()
    print_run(record, file=out)
    assert "86.1" in out.getvalue() and "a: test" not in out.getvalue()
    assert "15 figures in the record" in out.getvalue()


def test_an_interval_below_zero_can_be_read() -> None:
    out = io.StringIO()
    low = {"value": -0.151, "low": -0.299, "high": 0.0, "n": 9}
    print_matrix([{"brick": "a", "task": "x", "metric": "mcc", "role": "brick", **low}], file=out)
    assert "-15.1  -29.9 to 0.0" in out.getvalue()


def test_summary_of_a_run(tmp_path: Path) -> None:
    record = trained(tmp_path, "topic")
    out = io.StringIO()
    print_run(record, file=out)
    text = out.getvalue()
    assert text.startswith("topic · task/topic · seed 0 · done\n")
    row = next(line for line in text.splitlines() if line.startswith("test/accuracy")).split()
    assert row[1] == "88.0" and row[-1] == "250"
    assert "119,456 trained parameters, 9.5 s of training, 14.2 s in all, 412 samples/s" in text
    assert "1 check passed" in text
    merged = {**record["cost"], "train_seconds": None, "samples_per_second": None}
    assert cost_text(merged).startswith("119,456 parameters, 14.2 s in all")
    record["checks"]["logits"] = {"value": 1.0, "tolerance": 1e-5, "passed": False}
    record["status"], record["error"] = "failed", "loss is [bold]NaN[/bold]"
    for out in (io.StringIO(), Terminal()):
        print_run(record, file=out)
        assert "checks failed: logits" in out.getvalue()
        assert "loss is [bold]NaN[/bold]" in out.getvalue()  # no markup is read from texts


def test_a_run_without_test_rows_says_so(tmp_path: Path) -> None:
    record = trained(tmp_path, "topic")
    record["metrics"] = {}
    for splits, end in (
        (["train", "validation"], "; validation figures stand in metrics.jsonl of the run folder"),
        (["train"], ""),
    ):
        record["data"] = {"fingerprints": {f"topic/{split}": "0" * 64 for split in splits}}
        out = io.StringIO()
        print_run(record, file=out)
        assert f"no test rows, so no test figures{end}\n" in out.getvalue()
