"""Every recipe that trains runs for two steps, on real backbones and real rows, and can be used."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from cfm_train.config.catalogue import recipes
from cfm_train.launch.cli import main

#: Recipes that need a person's files: how those are made here, and on which backbone they run.
OWN = {
    "task/classify": ("bert", {"text": "w5 w6 w7", "label": "yes"}, ["data.text=text"]),
    "task/multilabel": ("llama", {"text": "w5 w6", "labels": ["a", "b"]}, []),
    "task/regress": ("gpt2", {"text": "w5 w6 w9", "label": 0.5}, []),
    "task/tag": ("bert", {"tokens": ["w5", "w6"], "tags": ["B-X", "O"]}, []),
    "task/lm": ("llama", {"text": "w5 w6 w7 w8 w9 w10"}, ["data.max_length=8"]),
    "task/instruct": ("gpt2", {"question": "w5 w6", "answer": "w7 w8"}, ["data.max_length=64"]),
    "task/seq2seq": ("t5", {"source": "w5 w6", "target": "w7 w8"}, []),
}

#: Recipes that run in a file of their own; those of documents are held complete in
#: tests/knowledge/test_study.py.
ELSEWHERE = {
    "backbone/pretrain": "operations/test_pretrain.py",
    "knowledge/facts": "operations/test_facts_run.py",
    "knowledge/forget": "operations/test_facts_run.py",
    "knowledge/map": "operations/test_facts_run.py",
    "knowledge/remember": "operations/test_facts_run.py",
    "generate": "operations/test_align.py",
    "merge/models": "merging/whole_models.py",
    "modality/align": "coloured_items.py",
    "modality/caption": "operations/test_caption.py",
    "modality/instruct": "operations/test_instruct.py",
    "modality/classify": "operations/test_align.py",
    "quickstart": "operations/test_tracked_runs.py",
}
DOCUMENTS = [
    name
    for name, one in recipes().items()
    if "data.documents" in one.needs and name not in ELSEWHERE
]
MERGES = [name for name in recipes() if name.startswith("merge/") and name != "merge/models"]

SHORT = [
    "trainer.max_steps=2",
    "trainer.validate_every=2",
    "trainer.rows_per_batch=8",
    "trainer.samples=2",
    "evaluation.bootstrap=20",
    "tracking=disabled",
]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Runs a command in this process and returns its record."""
    code = main(list(arguments))
    captured = capsys.readouterr()
    assert code == 0, captured.err[-3000:]
    record, dashboard = captured.out.splitlines()[-1], captured.out.splitlines()[-2]
    assert Path(dashboard.removeprefix("dashboard: ")).is_file()
    return json.loads(Path(record.removeprefix("record: ")).read_text())  # type: ignore[no-any-return]


def own_rows(example: dict[str, Any], count: int) -> str:
    """Rows like the example, all different in what they say and in their labels."""
    rows = []
    for i in range(count):
        row = dict(example)
        for key in ("text", "question", "source"):
            if key in row:
                row[key] = f"{row[key]} w{10 + i}"
        if "tokens" in row:
            row["tokens"] = [*row["tokens"], f"w{10 + i}"]
            row["tags"] = [*row["tags"], "O"]
        if isinstance(row.get("label"), str):
            row["label"] = ("yes", "no")[i % 2]
        elif isinstance(row.get("label"), float):
            row["label"] = i / count
        if "labels" in row:
            row["labels"] = row["labels"][: i % 3]
        rows.append(json.dumps(row))
    return "\n".join(rows) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [r for r in recipes() if r.startswith("task/")])
def test_two_steps_and_the_record_holds(
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """Two steps, the backbone unchanged, a brick in the library that verifies."""
    from tests.backbones import folder

    monkeypatch.chdir(tmp_path)
    arguments = [f"recipe={recipe}", *SHORT]
    if recipe in OWN:
        family, example, more = OWN[recipe]
        (tmp_path / "train.jsonl").write_text(own_rows(example, 24))
        (tmp_path / "test.jsonl").write_text(own_rows(example, 34).split("\n", 24)[24])
        arguments += [
            "name=own",
            "backbone=hf",
            f"backbone.path={folder(family)}",
            "data.train=train.jsonl",
            "data.test=test.jsonl",
            *more,
        ]
    elif not recipe.startswith("task/quick_") and recipe != "task/multitask":
        shared: Path = request.getfixturevalue("shared")
        (tmp_path / "tasks").mkdir()
        for split, count in (("train", 60), ("test", 40)):
            name = f"{recipe.removeprefix('task/')}.{split}.jsonl"
            with (shared / "data" / "tasks" / name).open(encoding="utf-8") as rows:
                first = "".join(itertools.islice(rows, count))
            (tmp_path / "tasks" / name).write_text(first, encoding="utf-8")
        arguments += ["data.root=tasks"]
    record = run(capsys, *arguments)
    assert record["status"] == "done"
    assert record["backbone"]["unchanged"] is True
    assert all(check["passed"] for check in record["checks"].values())
    assert record["metrics"], "a task with a test split has figures"
    for figure in record["metrics"].values():
        assert figure["low"] <= figure["value"] <= figure["high"] and figure["n"] > 0
    from cfm_train.library.store import Library

    brick = record["brick"]
    library = Library("outputs/library")
    assert library.find(brick["name"]).version == brick["version"]
    assert not library.verify(brick["name"])


@pytest.mark.slow
def test_from_training_to_merge_compare_and_predict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two bricks, their average, the matrix of all three, and answers to a file."""
    monkeypatch.chdir(tmp_path)
    for task in ("tense", "claim"):
        run(capsys, f"recipe=task/quick_{task}", f"name={task}", "data.limit=40", *SHORT)
    merged = run(
        capsys,
        "recipe=merge/linear",
        "bricks=[tense,claim]",
        "weights=[0.25,0.75]",
        "name=both",
        "tracking=disabled",
    )
    assert [(p["name"], p["weight"]) for p in merged["brick"]["parents"]] == [
        ("tense", 0.25),
        ("claim", 0.75),
    ]
    compared = run(
        capsys,
        "recipe=compare/bricks",
        "bricks=[tense,claim,both]",
        "evaluation=default",
        "evaluation.bootstrap=20",
        "tracking=disabled",
    )
    cells = {(c["brick"], c["task"]): c for c in compared["matrix"]}
    assert len(cells) == 6 and {c["role"] for c in compared["matrix"]} == {"brick", "merged"}
    single = run(
        capsys,
        "recipe=evaluate/tasks",
        "bricks=[tense]",
        "tasks=[quick_tense]",
        "evaluation.bootstrap=20",
        "tracking=disabled",
    )
    assert single["metrics"]["test/quick_tense/accuracy"]["value"] == pytest.approx(
        cells["tense", "quick_tense"]["value"]
    )
    Path("x.jsonl").write_text('{"text": "She left an hour ago"}\n{"text": "We will see"}\n')
    run(
        capsys,
        "recipe=predict",
        "bricks=[tense]",
        "data.input=x.jsonl",
        "out=y.jsonl",
        "tracking=disabled",
    )
    answers = [json.loads(line) for line in Path("y.jsonl").read_text().splitlines()]
    assert len(answers) == 2
    for answer in answers:
        assert answer["prediction"] in ("future", "past", "present")
        assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_layers_of_two_models_and_a_bridge_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A deeper model of repeated layers takes a brick; a bridge joins it to its source."""
    from tests.backbones import folder

    monkeypatch.chdir(tmp_path)
    source = folder("llama")
    made = run(
        capsys,
        "recipe=stitch/layers",
        f"slices=[{source}:0-2,{source}:0-2]",
        "out=deep",
        "name=deep",
        "tracking=disabled",
    )
    assert all(check["passed"] for check in made["checks"].values())
    (tmp_path / "train.jsonl").write_text(own_rows({"text": "w5 w6 w7 w8 w9 w10"}, 40))
    bridged = run(
        capsys,
        "recipe=stitch/bridge",
        "bottom=./deep",
        f"top={source}",
        "name=joint",
        "data.train=train.jsonl",
        "data.max_length=64",
        *SHORT,
        "trainer.samples=0",
    )
    assert all(check["passed"] for check in bridged["checks"].values())
    assert bridged["heatmaps"][0]["chosen"] and "penalty/trained bridge/loss" in bridged["metrics"]
    trained = run(
        capsys,
        "recipe=task/lm",
        "name=lm",
        "backbone=hf",
        "backbone.path=./deep",
        "data.train=train.jsonl",
        "data.test_fraction=0.2",
        "data.max_length=8",
        *SHORT,
    )
    assert trained["backbone"]["fingerprint"] == made["backbone"]["fingerprint"]


@pytest.mark.slow
def test_stitches_of_every_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two LoRA bricks and two prompts, stitched, compared on their tasks, and used again."""
    from cfm_train.stitching.mode import modes
    from tests.backbones import folder

    monkeypatch.chdir(tmp_path)
    _, example, more = OWN["task/classify"]
    Path("train.jsonl").write_text(own_rows(example, 24))
    Path("test.jsonl").write_text(own_rows(example, 34).split("\n", 24)[24])
    kinds = {
        "": ["brick=lora", "brick.sites=[attn.q,attn.o]"],
        "p": ["brick=soft_prompt", "brick.tokens=3"],
    }
    for kind, chosen in kinds.items():
        for number in (1, 2):
            run(
                capsys,
                "recipe=task/classify",
                f"name={kind or 'l'}{number}",
                f"seed={number}",
                "backbone=hf",
                f"backbone.path={folder('bert')}",
                "data.train=train.jsonl",
                "data.test=test.jsonl",
                *chosen,
                *more,
                *SHORT,
            )
    for mode in modes():
        assert f"stitch/{mode}" in recipes()
        one, two = ("p1", "p2") if mode == "prompt" else ("l1", "l2")
        record = run(
            capsys,
            f"recipe=stitch/{mode}",
            f"bricks=[{one},{two}]",
            f"name=by-{mode}",
            f"tasks=[{one},{two}]",
            "evaluation.bootstrap=20",
            "tracking=disabled",
        )
        assert all(check["passed"] for check in record["checks"].values())
        rows = [cell["brick"] for cell in record["matrix"][::2]]
        assert rows == [
            f"stitch([{one}, {two}], mode={mode})",
            f"stitch([{two}, {one}], mode={mode})",
            f"merge(linear, [{one}, {two}])",
            one,
            two,
        ]
        cells = {(cell["brick"], cell["task"]): cell["value"] for cell in record["matrix"]}
        for task in (one, two):
            penalty = record["metrics"][f"stitching penalty/{task}/accuracy"]["value"]
            # The rows are the same, but a head belongs to the brick that it was trained with.
            assert penalty == pytest.approx(cells[task, task] - cells[rows[0], task])
        if mode == "sum":
            assert record["metrics"]["order effect"]["value"] < 1e-4
    nested = "stitch([by-pipe, merge(ties, [l1, l2], density=0.5)])"
    for recipe in ("evaluate/tasks", "compare/bricks"):
        inner = run(
            capsys,
            f"recipe={recipe}",
            f'bricks=[by-chain,"{nested}"]',
            "tasks=[l1]",
            "evaluation.bootstrap=20",
            "tracking=disabled",
        )
        cells = {c["brick"]: c for c in inner["matrix"] if c["role"] == "merged"}
        assert list(cells) == ["by-chain", nested]
    Path("x.jsonl").write_text('{"text": "w5 w6"}\n')
    for brick in ("by-chain", "by-prompt"):
        task = "data.task=" + ("p1" if brick == "by-prompt" else "l1")
        run(capsys, "recipe=predict", f"bricks=[{brick}]", "data.input=x.jsonl", "out=y.jsonl",
            task, "tracking=disabled")  # fmt: skip
        (answer,) = map(json.loads, Path("y.jsonl").read_text().splitlines())
        assert answer["prediction"] in ("yes", "no")


@pytest.mark.slow
def test_statistics_and_every_merge_of_bricks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two bricks of one task, what is known of them, and what each recipe makes of both."""
    from tests.backbones import folder

    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text(own_rows({"text": "w5 w6 w7 w8 w9 w10"}, 24))
    for seed, name in enumerate("ab"):
        run(
            capsys, "recipe=task/lm", f"name={name}", f"seed={seed}", "backbone=hf",
            f"backbone.path={folder('llama')}", "data.train=train.jsonl", "data.max_length=8",
            "data.test_fraction=0.2", "brick=lora", "brick.rank=2", *SHORT,
        )  # fmt: skip
    for statistic in ("fisher", "gram"):
        run(capsys, f"recipe=analyze/{statistic}", "bricks=[a,b]", "rows=8", "tracking=disabled")
    for recipe in MERGES:
        merged = run(
            capsys, f"recipe={recipe}", f"name={recipe.split('/')[1]}", "bricks=[a,b]",
            "evaluation.bootstrap=20", "tracking=disabled",
        )  # fmt: skip
        assert merged["status"] == "done", recipe
        assert all(check["passed"] for check in merged["checks"].values()), recipe
        assert [parent["name"] for parent in merged["brick"]["parents"]] == ["a", "b"]


def test_no_recipe_is_left_out() -> None:
    """Each recipe runs in this file, or in the file that is named here and names it."""
    here = Path(__file__).read_text(encoding="utf-8")
    for name in recipes():
        if name in ELSEWHERE:
            text = (Path(__file__).parent / ELSEWHERE[name]).read_text(encoding="utf-8")
            assert f"recipe={name}" in text, name
        else:
            kinds = ("task/", "stitch/", "analyze/", *MERGES, *DOCUMENTS)
            assert name.startswith(kinds) or f"recipe={name}" in here, name
    assert set(ELSEWHERE) <= set(recipes())
