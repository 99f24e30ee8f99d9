"""What teaching and forgetting refuse before they begin, and which checks they report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cfm_train.knowledge import teach
from cfm_train.launch.cli import main
from cfm_train.library.store import Library
from tests.backbones import folder
from tests.fact_cases import TOLD
from tests.test_recipes_run import run


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    rows = "".join(json.dumps(fact.taught()) + "\n" for fact in TOLD)
    Path("facts.jsonl").write_text(rows)
    return [
        "recipe=knowledge/facts", "name=told", "backbone=hf", f"backbone.path={folder('llama')}",
        "data.facts=facts.jsonl", "teaching.steps=1", "teaching.contexts=0",
        "evaluation.bootstrap=5", "tracking=disabled",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["backbone@sentence_encoder=hf"], "sentence_encoder.path is missing"),
        (
            ["backbone@sentence_encoder=hf", "sentence_encoder.path=./nowhere"],
            "There is no sentence_encoder folder './nowhere' ('sentence_encoder.path')",
        ),
        (["sentence_encoder.path=nowhere"], "no folder 'nowhere' ('sentence_encoder.path')"),
        (["sentence_encoder.package=no_such"], "'no_such' of 'sentence_encoder.package' is not"),
        (["sentence_encoder.sha256=" + "0" * 64], "but 'sentence_encoder.sha256' pins"),
        (["gate.kind=none", "gate.threshold=0.5"], "gate.threshold=0.5 is that of a gate"),
        (["data.unrelated=no.txt"], "data.unrelated: no.txt cannot be read"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_made(
    overrides: list[str], complaint: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *overrides]) == 2
    assert complaint in capsys.readouterr().err
    assert not Path("outputs").exists()


@pytest.mark.parametrize("dry", [True, False])
def test_a_language_model_is_no_sentence_encoder(
    dry: bool,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is refused before anything is taught."""

    def taught(*given: Any, **more: Any) -> Any:
        raise AssertionError("taught before the encoder was opened")

    monkeypatch.setattr(teach, "teach", taught)
    wrong = ["backbone@sentence_encoder=hf", f"sentence_encoder.path={folder('llama')}"]
    assert main([*command, *wrong, f"dry_run={str(dry).lower()}"]) == 2
    assert "is a language model (decoder), no encoder" in capsys.readouterr().err


def test_vectors_of_ones_own_are_read_by_a_map_alone(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["evaluation.bootstrap=5", "tracking=disabled"]
    mapped = [*command, "brick=map", "brick.told=vector", "gate.kind=none"]
    assert main(mapped) == 2
    assert "facts.jsonl:1 has no column 'vector'" in capsys.readouterr().err
    rows = [json.dumps({**fact.taught(), "vector": [1, at, 2]}) for at, fact in enumerate(TOLD)]
    Path("facts.jsonl").write_text("\n".join(rows[:2]))
    Path("more.jsonl").write_text(rows[2])
    assert main([*command, "brick=encoded_rows"]) == 2
    assert "is read by brick=map brick.told=vector alone" in capsys.readouterr().err
    told = run(capsys, *mapped)
    assert told["metrics"]["bytes_per_fact"]["value"] == 3 * 2
    assert len(Library("outputs/library").find("told").requires) == 1
    remember = ["recipe=knowledge/remember", "name=more", "bricks=[told]"]
    more = run(capsys, *remember, "data.facts=more.jsonl", *short)
    assert all(check["passed"] for check in more["checks"].values())
    Path("more.jsonl").write_text(rows[2].replace("[1, 2, 2]", "[1, 2]"))
    assert main([*remember, "data.facts=more.jsonl"]) == 2
    assert "takes vectors of 3 numbers" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["encoder", "none"])
def test_a_check_that_was_not_made_is_not_reported(
    kind: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    gate = [
        f"gate.kind={kind}", "backbone@sentence_encoder=hf",
        f"sentence_encoder.path={folder('bert')}",
    ]  # fmt: skip
    told = run(capsys, *command, *gate)
    card = Library("outputs/library").find("told")
    assert len(card.requires) == (2 if kind == "encoder" else 1)
    assert card.requires[0] == told["backbone"]["fingerprint"]
    less = run(capsys, "recipe=knowledge/forget", "name=less", "bricks=[told]", "facts=[1]",
               "tracking=disabled")  # fmt: skip
    assert Library("outputs/library").find("less").requires == card.requires
    expected = {"backbone unchanged"}
    if kind == "encoder":
        expected |= {"the others' answers are as they were"}
        expected |= {"the gate no longer finds what is forgotten"}
    else:  # all act at once: what they say together is another thing without one
        expected |= {"the others' answers are as they were, each fact by itself"}
    assert set(less["checks"]) == expected
    assert all(check["passed"] for check in less["checks"].values())
    wrong = ["recipe=knowledge/remember", "name=x", "bricks=[told]", "data.facts=facts.jsonl"]
    assert main(wrong) == 2
    assert "(neurons) computes no facts: teach them" in capsys.readouterr().err
    if kind == "encoder":  # what the gate reads with is not what the brick is plugged into
        wrong = ["recipe=knowledge/forget", "name=x", "bricks=[told]", "facts=[1]", "backbone=hf"]
        assert main([*wrong, f"backbone.path={folder('bert')}"]) == 2
        assert "was made for the backbone" in capsys.readouterr().err
