"""Runs on documents: from the command line to record, card and library; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cfm_train.config.catalogue import recipes
from cfm_train.errors import UserError
from cfm_train.launch.cli import main
from cfm_train.operations.study import check
from tests.backbones import folder
from tests.knowledge.handbooks import command, config, text
from tests.test_recipes_run import run

#: Recipes on documents, with what each is run with beyond its two steps.
RECIPES = {
    "lora": ["objective.keep=0.1", "data.unrelated=other.txt"],
    "cartridge": [],
    "neurons": ["brick.neurons=4"],
    "rows": ["brick.rows=8"],
    "prefix": ["data.unrelated=other.txt"],
}


def test_every_recipe_on_documents_is_run_here() -> None:
    found = {n for n, one in recipes().items() if "data.documents" in one.needs}
    found -= {"knowledge/map"}  # makes facts of them: tests/operations/test_facts_run.py
    assert {f"knowledge/{name}" for name in RECIPES} == found


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps_and_the_record_holds(
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.txt").write_text(text(30, seed=7))
    arguments = command(tmp_path, folder("llama"), recipe, *RECIPES[recipe])
    record = run(capsys, *arguments)
    assert record["status"] == "done" and record["operation"] == "study"
    assert record["backbone"]["unchanged"] and len(record["checks"]) == 2
    assert all(check["passed"] for check in record["checks"].values())
    arms = record["arms"]
    assert [arm["name"] for arm in arms["arms"]] == ["bare", "text", "brick", "both"]
    assert [(g["arm"], g["over"]) for g in arms["gains"]] == [
        ("brick", "bare"),
        ("both", "text"),
        ("brick", "text"),
    ]
    by_name = {arm["name"]: arm for arm in arms["arms"]}
    for name, arm in by_name.items():
        for metric in ("loss", "token_accuracy", "exact_match"):
            assert record["metrics"][f"test/{name}/{metric}"] == arm[metric]
            assert arm[metric]["n"] == arms["questions"] > 0
    gain = arms["gains"][0]["loss"]["value"]
    found = by_name["brick"]["loss"]["value"] - by_name["bare"]["loss"]["value"]
    assert gain == pytest.approx(found)
    assert (arms["unrelated"] is not None) == ("data.unrelated=other.txt" in RECIPES[recipe])
    if arms["unrelated"]:
        ratio = arms["unrelated"]["brick_perplexity"]["value"]
        ratio /= arms["unrelated"]["bare_perplexity"]["value"]
        assert arms["unrelated"]["perplexity_ratio"]["value"] == pytest.approx(ratio)
    page = (Path(record["wandb"] and ".") / "outputs" / "runs").glob("*/*/dashboard.html")
    assert '"arms":[{' in next(iter(page)).read_text()
    from cfm_train.library.store import Library

    assert not Library("outputs/library").verify("handbook")
    assert main(arguments) == 0  # the same command again prints the record
    assert "finished before" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cartridge_is_trained_among_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other is pinned in the hash, and there is an arm in which both are plugged in."""
    monkeypatch.chdir(tmp_path)
    first = command(
        tmp_path, folder("llama"), "cartridge", "name=first", "evaluation.generate=false"
    )
    run(capsys, *first)
    second = [*first, "name=second", "distractors=[first]", "seed=1"]
    record = run(capsys, *second)
    assert any(key.startswith("brick/first@") for key in record["inputs"])
    assert record["arms"]["arms"][-1]["name"] == "among others"
    assert record["arms"]["gains"][-1]["over"] == "brick"
    assert "exact_match" not in record["arms"]["arms"][0]
    wide = [*second, "name=third", "brick.tokens=96", "data.context=8", "dry_run=true"]
    assert main(wide) == 0, "at shared positions the longest counts"
    behind = [*first, "name=behind", "brick.positions=behind"]
    run(capsys, *behind)
    run(capsys, *behind, "name=next", "distractors=[behind]", "seed=1")
    capsys.readouterr()
    assert main([*wide, "brick.positions=behind", "distractors=[behind,next]"]) == 2
    assert "own 96 tokens and the 16 of its distractors make 136" in capsys.readouterr().err


@pytest.mark.slow
def test_a_lora_is_trained_beside_another_and_beside_a_cartridge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is beside it stands still, and a cartridge takes its room from the context."""
    monkeypatch.chdir(tmp_path)
    quick = ["evaluation.generate=false", "trainer.samples=0"]
    pages = command(tmp_path, folder("llama"), "cartridge", "name=pages", "brick.tokens=16")
    run(capsys, *pages, *quick)
    run(capsys, *command(tmp_path, folder("llama"), "lora", "name=first", *quick))
    from cfm_train.library.store import Library

    before = Library("outputs/library").find("first").files
    second = [*command(tmp_path, folder("llama"), "lora", "name=second", *quick), "seed=1"]
    record = run(capsys, *second, "distractors=[first,pages]")
    assert [key for key in record["inputs"] if key.startswith("brick/")] != []
    assert record["arms"]["arms"][-1]["name"] == "among others"
    assert all(check["passed"] for check in record["checks"].values())
    assert Library("outputs/library").find("first").files == before
    assert not Library("outputs/library").verify("first")
    crowded = [*second, "name=third", "distractors=[pages]"]
    assert main([*crowded, "data.max_length=120", "data.context=8"]) == 2
    assert "the 16 of its distractors make 136" in capsys.readouterr().err


@pytest.mark.slow
def test_regmean_of_two_documents_bricks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What their maps read is gathered on the documents' own tokens, each of them once."""
    from safetensors.torch import load

    from cfm_train.library.sidecar import find_sidecars
    from cfm_train.library.store import Library

    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text(text(seed=5))
    one = command(tmp_path, folder("llama"), "lora", "name=one", "evaluation.generate=false")
    run(capsys, *one, "trainer.samples=0")
    run(capsys, *one, "trainer.samples=0", "name=two", "data.documents=two.txt", "seed=1")
    for statistic in ("gram", "fisher"):
        record = run(capsys, f"recipe=analyze/{statistic}", "bricks=[one,two]", "rows=1000")
        assert {key.split("/")[-1] for key in record["inputs"]} >= {"documents"}
    library = Library("outputs/library")
    grams = []
    for name in ("one", "two"):
        (sidecar,) = find_sidecars(library, library.find(name), "gram.safetensors")
        grams.append(load(sidecar.read("gram.safetensors") or b""))
    assert not all(bool((grams[0][site] == grams[1][site]).all()) for site in grams[0])
    pages = command(tmp_path, folder("llama"), "cartridge", "name=pages")
    run(capsys, *pages, "evaluation.generate=false", "trainer.samples=0")
    for wrong, sentence in (
        (["bricks=[one,pages]"], "adds keys and values at 'layer.0.attn'"),
        (["bricks=[one]", "data.limit=4"], "data.limit is for bricks of tasks"),
    ):
        runs = sorted(Path("outputs/runs").rglob("*"))
        assert main(["recipe=analyze/gram", *wrong]) == 2
        assert sentence in capsys.readouterr().err
        assert sorted(Path("outputs/runs").rglob("*")) == runs
    quiet = ["name=both", "tracking=disabled"]
    merged = run(capsys, "recipe=merge/regmean", "bricks=[one,two]", *quiet)
    assert [parent["name"] for parent in merged["brick"]["parents"]] == ["one", "two"]


@pytest.mark.slow
def test_a_persons_questions_in_a_jsonl_of_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"body": line, "id": i} for i, line in enumerate(text().split("\n\n"))]
    Path("a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    asked = [" ".join(row["body"].split()[:5]) for row in rows]
    answers = [" ".join(row["body"].split()[5:]) for row in rows]
    lines = [json.dumps({"prompt": p, "answer": a}) for p, a in zip(asked, answers, strict=True)]
    Path("questions.jsonl").write_text("\n".join(lines) + "\n")
    arguments = command(tmp_path, folder("gpt2"), "cartridge", "data.documents=a.jsonl")
    record = run(capsys, *arguments, "data.text=body", "data.questions=questions.jsonl")
    assert record["arms"]["made"] == "given"


@pytest.mark.parametrize(
    ("recipe", "more", "sentence"),
    [
        ("lora", ["objective.keep=0.1"], "needs text to be kept: give data.unrelated=FILE"),
        ("lora", ["objective.learn=[]"], "objective.learn is empty"),
        ("prefix", ["brick=lora"], "lora is trained: use recipe=knowledge/lora"),
        ("prefix", ["trainer.epochs=9"], "trainer.epochs=9 is for training, and a brick of kind"),
        ("lora", ["brick=map", "~brick.sites"], "brick=map is computed from facts"),
        ("lora", ["brick=document"], "is not trained, so it has no objective"),
        ("lora", ["data.context=1000"], "reads 128 at most: lower them"),
        ("cartridge", ["brick.tokens=100"], "brick's own 100 tokens make 148.*or set brick.tokens"),
        (
            "lora",
            ["brick=soft_prompt", "~brick.sites", "distractors=[a]"],
            "distractors are plugged in beside a cartridge or a LoRA",
        ),
        ("cartridge", ["distractors=[nobody]"], "nobody"),
        ("lora", ["data.documents=gone.txt"], "there is no such file"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_made(
    recipe: str,
    more: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = command(tmp_path, folder("llama"), recipe, *more)
    with pytest.raises(UserError, match=sentence):
        check(config(*arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["handbook.txt"]


def test_a_document_that_leaves_no_room_is_refused_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = command(tmp_path, folder("llama"), "prefix", "brick.tokens=null")
    (tmp_path / "handbook.txt").write_text(text(14))
    assert main(arguments) == 2
    assert "or set brick.tokens" in capsys.readouterr().err
    assert not (tmp_path / "outputs" / "runs").exists()


@pytest.mark.parametrize(
    ("more", "sites"),
    [
        (["brick=prefix", "brick.sites=[attn]"], ["attn"]),
        (["brick=soft_prompt", "~brick.sites"], None),
    ],
)
def test_other_kinds_are_taught_as_the_docs_say(more: list[str], sites: list[str] | None) -> None:
    base = ["recipe=knowledge/lora", "name=a", "data.documents=y"]
    assert config(*base, *more)["brick"].get("sites") == sites


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("objective.kep=1", "objective.kep is no key of objective.* Did you mean 'objective.keep'"),
        ("objective.kind=lmm", "there is no objective kind"),
        ("objective.keep=-1", "greater than or equal to 0"),
        ("objective.learn=[books]", "documents.*questions"),
        ("data.limit=5", "data.limit is no key"),
    ],
)
def test_a_wrong_key_is_a_sentence(override: str, sentence: str) -> None:
    base: list[Any] = ["recipe=knowledge/lora", "name=a", "data.documents=y"]
    with pytest.raises(UserError, match=sentence):
        config(*base, override)
