"""Comparing, from commands alone: bounds, choice on validation, and nothing asked twice."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cfm_train.configuration.parser import parse
from cfm_train.launch.cli import main
from tests.backbones import folder
from tests.operations.test_tracked_runs import inspect
from tests.tasks import raw_row

SHORT = ["trainer.max_steps=3", "trainer.samples=0", "evaluation.bootstrap=50", "tracking=disabled"]
ROWS = [
    "a", "b",
    *(f"merge(linear, [a, b], scale={scale})" for scale in (0.5, 1.0, 2.0)),
    "stitch([a, merge(linear, [b, a], weights=[0.25, 0.75])])",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command in the module's folder; gives its record and the run's folder."""
    monkeypatch.chdir(place)
    for name in ("CFM_LIBRARY", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)

    def command(*arguments: str) -> tuple[dict[str, Any], Path]:
        capsys.readouterr()
        code = main(list(arguments))
        out, err = capsys.readouterr()
        assert code == 0, err[-3000:]
        path = Path(out.splitlines()[-1].removeprefix("record: "))
        return json.loads(path.read_text()), path.parent

    return command


def train(run: Any, name: str, *more: str) -> dict[str, Any]:
    """A brick on rows of its own; 24 to train on, 8 of which to validate, 20 to test."""
    draw = random.Random(name)
    for split, count in (("train", 32), ("test", 20)):
        rows = [raw_row("classification", draw) for _ in range(count)]
        Path(f"{name}.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    record, _ = run(
        "recipe=task/classify", f"name={name}", "backbone=hf", f"backbone.path={folder('bert')}",
        f"data.train={name}.train.jsonl", f"data.test={name}.test.jsonl",
        "data.validation_fraction=0.25", *SHORT, *more,
    )  # fmt: skip
    return record  # type: ignore[no-any-return]


def compare(run: Any, *more: str, rows: list[str] = ROWS) -> tuple[dict[str, Any], Path]:
    listed = "[" + ",".join(f"'{row}'" if "(" in row else row for row in rows) + "]"
    return run("recipe=compare/bricks", f"bricks={listed}", "evaluation.bootstrap=50", *more)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_comparison_its_bounds_and_its_second_run(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at, name in enumerate("ab"):
        train(run, name, f"seed={at}")
    train(run, "other", "seed=3")  # gives the unrelated task; is not compared
    first, home = compare(run, "tasks=[a,b]", "tracking.mode=offline", "name=first")
    found = first["comparison"]
    cells = {(c["brick"], c["task"]): c for c in first["matrix"]}
    labels = [str(parse(row)) for row in ROWS]
    assert {brick for brick, _ in cells} == {*labels, "frozen backbone"}
    assert {c["role"] for c in first["matrix"]} == {"brick", "merged", "floor"}
    assert found["individuals"] == {"a": "a", "b": "b"} and found["tasks"] == ["a", "b"]

    # Of the three λ one competes, the best on validation; the curve has all three.
    (curve,) = (c for c in found["curves"] if c["parameter"] == "scale")
    assert [point["x"] for point in curve["points"]] == [0.5, 1.0, 2.0]
    best = max(curve["points"], key=lambda point: point["validation"])
    assert [p["row"] for p in curve["points"] if p["chosen"]] == [
        next(p["row"] for p in curve["points"] if p["validation"] == best["validation"])
    ]
    competing = [row["label"] for row in found["rows"] if row["competes"]]
    assert len(competing) == 4 and found["winner"]["label"] in competing
    for point in curve["points"]:
        mean = np.mean([cells[point["row"], task]["value"] for task in "ab"])
        assert point["mean"]["value"] == pytest.approx(mean)

    # Averages, against the cells.
    for row in found["rows"]:
        values = [cells[row["label"], task]["value"] for task in "ab"]
        own = [cells[task, task]["value"] for task in "ab"]
        assert row["mean"]["value"] == pytest.approx(np.mean(values))
        if row["normalised"]:
            shares = [value / base for value, base in zip(values, own, strict=True)]
            assert row["normalised"]["value"] == pytest.approx(np.mean(shares))
    second = {(c["brick"], c["task"]): c for c in first["refitted"]}
    assert {brick for brick, _ in second} == set(competing)
    assert all(c["head"] == "head refitted" for c in first["refitted"])

    # ΔW, the nested stitch's opposite order, and b's brick on a's task against the bare backbone.
    assert set(found["similarity"]["labels"]) == {"a", "b", competing[2]}
    (order,) = found["orders"]
    assert order["reverse"].startswith("stitch([merge(linear, [b, a], weights=[0.25, 0.75]), a]")
    assert order["effect"]["value"] > 0
    for one in order["tasks"]:
        apart = one["given"]["value"] - one["reverse"]["value"]
        assert one["difference"]["value"] == pytest.approx(apart)
    forgot = {(f["row"], f["task"]): f for f in found["forgetting"]}
    assert set(forgot) == {("a", "b"), ("b", "a")}
    for f in forgot.values():
        assert f["bare"]["value"] == cells["frozen backbone", f["task"]]["value"]
        apart = f["with_brick"]["value"] - f["bare"]["value"]
        assert f["change"]["value"] == pytest.approx(apart)
    rows = {row["label"]: row for row in found["rows"]}
    assert rows["a"]["seconds_of"] == "training" and rows[competing[2]]["seconds_of"] == "assembly"
    ids = {node["id"] for node in found["lineage"]["nodes"]}
    assert all(part["name"] + "@" + part["version"] in ids for row in rows.values()
               for part in row["parts"])  # fmt: skip

    # The same tables in W&B, by their content.
    logged = [r for r in inspect(home) if r["type"] == "history"]
    keys = {key for r in logged for key in r["history"]["item"]}
    for table in ("matrix", "matrix_refitted", "ranking", "curves", "similarity", "order_effects",
                  "forgetting", "winner", "lineage"):  # fmt: skip
        assert any(key.startswith(table) for key in keys), (table, keys)
        (path,) = home.glob(f"wandb/offline-run-*/files/media/table/{table}_[0-9]*.table.json")
        assert json.loads(path.read_text())["data"], table
    assert any("charts/ranking" in json.dumps(r) for r in inspect(home))

    # What the first one evaluated is taken from it: no forward pass of the backbone.
    calls = []
    forward = torch.nn.Embedding.forward

    def counted(module: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        calls.extend([] if ids.is_meta else [ids.shape])  # sites are found on the meta device
        return forward(module, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", counted)
    again, _ = compare(run, "tasks=[a,b]", "tracking=disabled", "name=second", rows=ROWS[1:])
    assert calls == [] and again["comparison"]["reused"]["made"] == 0
    assert again["comparison"]["reused"]["found"] > 0
    values = {(c["brick"], c["task"]): (c["value"], c["low"]) for c in again["matrix"]}
    assert values == {key: (cells[key]["value"], cells[key]["low"]) for key in values}
    assert again["comparison"]["orders"] == found["orders"]
    assert {c["source"].split("/")[0] for c in again["matrix"]} >= {"compare-bricks"}
