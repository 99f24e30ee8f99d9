"""What operations on finished bricks write, from commands alone: answers, matrices, lineage."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from cfm_train.launch.cli import main
from tests.backbones import folder
from tests.tasks import raw_row

TYPES = {
    "classification": ("classify", "bert", []),
    "multilabel": ("multilabel", "bert", ["data.label=label"]),
    "regression": ("regress", "llama", []),
    "token": ("tag", "bert", ["data.label=label"]),
}
SHORT = ["trainer.max_steps=3", "trainer.samples=0", "evaluation.bootstrap=20", "tracking=disabled"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command in an empty folder; gives its record and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CFM_LIBRARY", raising=False)

    def command(*arguments: str) -> tuple[dict[str, Any], str]:
        capsys.readouterr()
        code = main(list(arguments))
        out, err = capsys.readouterr()
        assert code == 0, err[-3000:]
        record = json.loads(Path(out.splitlines()[-1].removeprefix("record: ")).read_text())
        return record, out

    return command


def write(task: str, count: int = 24) -> list[dict[str, Any]]:
    """Train and test files of a task; the test rows."""
    draw = random.Random(task)
    made = {split: [raw_row(task, draw) for _ in range(count)] for split in ("train", "test")}
    for split, found in made.items():
        Path(f"{task}.{split}.jsonl").write_text("\n".join(map(json.dumps, found)) + "\n")
    return made["test"]


def train(run: Any, task: str, name: str, *more: str) -> dict[str, Any]:
    recipe, family, own = TYPES[task]
    record, _ = run(
        f"recipe=task/{recipe}",
        f"name={name}",
        "backbone=hf",
        f"backbone.path={folder(family)}",
        f"data.train={task}.train.jsonl",
        f"data.test={task}.test.jsonl",
        *own,
        *SHORT,
        *more,
    )
    return record  # type: ignore[no-any-return]


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The answers in a CSV or Parquet file as pandas reads them, in the shape of JSON lines."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()  # type: ignore[no-any-return]
    frame = pd.read_csv(path, keep_default_na=False, float_precision="round_trip")
    found: list[dict[str, Any]] = []
    for cells in frame.to_dict("records"):
        value = cells.pop("prediction")
        listed = isinstance(value, str) and value.startswith("[")
        answer = {"prediction": json.loads(value) if listed else value}
        if cells:
            answer["probabilities"] = {
                key.removeprefix("probability of "): share for key, share in cells.items()
            }
        found.append(answer)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("task", list(TYPES))
def test_answers_are_those_that_were_judged(task: str, run: Any) -> None:
    """The figures of training, of ``evaluate`` and of the answers' own file are the same."""
    rows = write(task)
    name = "v1.2" if task == "classification" else "mine"
    trained = train(run, task, name)
    run("recipe=predict", f"bricks=[{name}]", f"data.input={task}.test.jsonl", "out=y.jsonl",
        "tracking=disabled")  # fmt: skip
    answers = [json.loads(line) for line in Path("y.jsonl").read_text().splitlines()]
    said = [answer["prediction"] for answer in answers]
    right = [row["label"] for row in rows]
    metrics = {key.split("/")[1]: value["value"] for key, value in trained["metrics"].items()}
    assert len(said) == len(right)
    if task == "classification":
        assert metrics["accuracy"] == pytest.approx(
            sum(a == b for a, b in zip(said, right, strict=True)) / len(right)
        )
    elif task == "multilabel":
        exact = sum(set(a) == set(b) for a, b in zip(said, right, strict=True)) / len(right)
        assert metrics["exact"] == pytest.approx(exact)
    elif task == "regression":
        squares = [(a - b) ** 2 for a, b in zip(said, right, strict=True)]
        assert metrics["rmse"] == pytest.approx((sum(squares) / len(squares)) ** 0.5, rel=1e-3)
    else:
        pairs = [
            (a, b) for x, y in zip(said, right, strict=True) for a, b in zip(x, y, strict=True)
        ]
        share = sum(a == b for a, b in pairs) / len(pairs)
        assert metrics["token_accuracy"] == pytest.approx(share)
    for ending in ("csv", "parquet"):
        run("recipe=predict", f"bricks=[{name}]", f"data.input={task}.test.jsonl",
            f"out=y.{ending}", "tracking=disabled")  # fmt: skip
        assert read_answers(Path(f"y.{ending}")) == answers
    evaluated, out = run(
        "recipe=evaluate/tasks", f"bricks=[{name}]", "evaluation.bootstrap=20", "tracking=disabled"
    )
    for metric, value in metrics.items():
        assert evaluated["metrics"][f"test/{name}/{metric}"]["value"] == pytest.approx(
            value, abs=1e-5
        )
    assert out.count("95 % interval") <= 1 and out.count("frozen backbone") == 0


@pytest.mark.slow
def test_a_head_that_is_refitted_is_announced(run: Any) -> None:
    """On a task that no brick has a head for; the figures alone would not tell."""
    write("classification")
    train(run, "classification", "mine")
    short = ("data.limit=16", "evaluation.bootstrap=20", "tracking=disabled")
    record, out = run("recipe=evaluate/tasks", "bricks=[mine]", "tasks=[mine,quick_tone]", *short)
    assert "quick_tone: no brick brings a head; one is refitted on each brick" in out
    assert "mine: no brick" not in out
    assert [cell["head"] for cell in record["matrix"]] == ["mine", "head refitted"]


@pytest.mark.slow
def test_merges_compare_and_their_lineage(run: Any) -> None:
    """A merge of a merge: shares, heads and tasks of the grandparents; drawn with their runs."""
    write("classification")
    bricks = {n: train(run, "classification", n, f"seed={i}") for i, n in enumerate("abc")}
    merged, _ = run("recipe=merge/linear", "bricks=[a,b]", "weights=[0.25,0.75]", "name=ab",
                    "tracking=disabled")  # fmt: skip
    promise = merged["checks"]["weight 1 on one brick is that brick"]
    assert promise["passed"] and promise["value"] <= promise["tolerance"]
    nested, _ = run(
        "recipe=merge/linear",
        "bricks=['merge(linear, [a, b], weights=[0.25, 0.75])',c]",
        "weights=[0.4,0.6]",
        "name=abc",
        "tracking=disabled",
    )
    shares = {p["name"]: p["weight"] for p in nested["brick"]["parents"]}
    assert shares == pytest.approx({"a": 0.1, "b": 0.3, "c": 0.6})
    run("recipe=merge/linear", "bricks=[ab,c]", "weights=[0.4,0.6]", "name=twice",
        "tracking=disabled")  # fmt: skip
    compared, out = run(
        "recipe=compare/bricks", "bricks=[a,b,c,twice]", "evaluation=default",
        "evaluation.bootstrap=20", "tracking=disabled",
    )  # fmt: skip
    cells = {(c["brick"], c["task"]): c for c in compared["matrix"]}
    assert len(cells) == 12 and {task for _, task in cells} == {"a", "b", "c"}
    assert {c["role"] for c in compared["matrix"] if c["brick"] == "twice"} == {"merged"}
    for name, record in bricks.items():
        own = record["metrics"]["test/accuracy"]["value"]
        assert cells[name, name]["value"] == pytest.approx(own)
    page = Path(out.splitlines()[-2].removeprefix("dashboard: ")).read_text()
    assert all(record["config_hash"][:10] in page for record in bricks.values())


@pytest.mark.slow
def test_labels_that_changed_are_refused(
    run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The head says no and yes; the file's rows now say yes and zebra: no figures, no folder."""
    write("classification")
    train(run, "classification", "mine")
    for split in ("train", "test"):
        path = Path(f"classification.{split}.jsonl")
        path.write_text(path.read_text().replace('"no"', '"zebra"'))
    before = sorted(tmp_path.rglob("*"))
    code = main(["recipe=evaluate/tasks", "bricks=[mine]", "tracking=disabled"])
    err = capsys.readouterr().err
    assert code == 2
    assert "classification into no, yes" in err and "zebra" in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_row_beyond_all_numbers_is_named(
    run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Status failed, exit code 1; the sentence has the step, the task, the file and the line."""
    write("regression")
    path = Path("regression.train.jsonl")
    # Mean and deviation of these are numbers of float32; what lies between line 7 and the mean is
    # not.
    lines = [json.dumps({**json.loads(line), "label": -3e38}) for line in path.open()]
    lines[6] = json.dumps({**json.loads(lines[6]), "label": 3e38})
    path.write_text("\n".join(lines) + "\n")
    code = main([
        "recipe=task/regress", "name=mine", "backbone=hf", f"backbone.path={folder('bert')}",
        f"data.train={path}", "data.test=regression.test.jsonl", "data.validation_fraction=0.0",
        *SHORT, "trainer.max_steps=8",
    ])  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 1
    assert "the loss is inf at step" in err and "rows of mine:" in err
    assert f"{path.name}:7" in err and f"{path.name}:6" not in err
    record = json.loads(Path(out.splitlines()[-1].removeprefix("record: ")).read_text())
    assert record["status"] == "failed" and "regression.train.jsonl:7" in record["error"]


@pytest.mark.slow
def test_a_head_alone_cannot_learn_a_language_task(
    run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write("causal")
    code = main([
        "recipe=task/lm", "name=mine", "backbone=hf", f"backbone.path={folder('llama')}",
        "data.train=causal.train.jsonl", "brick=head", *SHORT,
    ])  # fmt: skip
    err = capsys.readouterr().err
    assert code == 2 and "nothing to train" in err
    assert not list(tmp_path.glob("outputs/runs/*/*"))
