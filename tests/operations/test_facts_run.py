"""Recipes of facts: taught, killed, forgotten, and remembered without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cfm_train.launch.cli import main
from cfm_train.library.store import Library
from tests.backbones import folder
from tests.test_recipes_run import run


@pytest.mark.slow
@pytest.mark.parametrize("brick", ["neurons", "rows", "lora_facts", "cartridge_facts"])
def test_facts_are_taught_and_forgotten(
    brick: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three facts in two groups, one forgotten; broken off after a group it comes to the same."""
    from cfm_train.knowledge import teach
    from tests.fact_cases import TOLD

    monkeypatch.chdir(tmp_path)
    rows = [{**fact.taught(), "others": [f"{fact.subject} w40"]} for fact in TOLD]
    Path("facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("text.txt").write_text("w50 w51 w52 w53 w54 w55 " * 8)
    command = [
        "recipe=knowledge/facts", "name=told", "backbone=hf", f"backbone.path={folder('llama')}",
        f"brick={brick}", "data.facts=facts.jsonl", "data.unrelated=text.txt",
        "teaching.steps=2", "teaching.facts_per_group=2", "teaching.contexts=2",
        "evaluation.bootstrap=20", "evaluation.window_tokens=8",
    ]  # fmt: skip
    whole = run(capsys, *command, "tracking=disabled", "outputs=whole", "library=whole/library")
    assert all(check["passed"] for check in whole["checks"].values())
    for name, figure in whole["metrics"].items():
        assert figure["low"] <= figure["value"] <= figure["high"], name
    assert whole["metrics"]["unrelated/perplexity_ratio"]["value"] == 1

    groups, plain = [], teach.teach

    def killed(*given: Any, **more: Any) -> Any:
        groups.append(given[2])
        if len(groups) == 2:
            raise KeyboardInterrupt
        return plain(*given, **more)

    monkeypatch.setattr(teach, "teach", killed)
    assert main([*command, "tracking.mode=offline"]) == 130
    capsys.readouterr()
    broken = run(capsys, *command, "tracking.mode=offline")
    assert [len(group) for group in groups] == [2, 1, 1]
    assert broken["brick"]["version"] == whole["brick"]["version"]
    same = {name: figure for name, figure in whole["metrics"].items() if "seconds" not in name}
    assert {name: broken["metrics"][name] for name in same} == same

    less = run(
        capsys, "recipe=knowledge/forget", "name=less", "bricks=[told]", "facts=[w4]",
        "tracking=disabled",
    )  # fmt: skip
    assert all(check["passed"] for check in less["checks"].values())
    assert less["brick"]["parents"][0]["version"] == whole["brick"]["version"]
    for wrong, complaint in (
        (["recipe=knowledge/forget", "bricks=[told]", "facts=[w9]"], "knows nothing about 'w9'"),
        (["recipe=knowledge/forget", "bricks=[less]", "facts=[0,1]"], "would know nothing"),
        (["recipe=merge/linear", "bricks=[told,less]"], "holds facts"),
        ([*command[:4], "data.facts=facts.jsonl", "brick=lora"], "has no parameters for each fact"),
    ):
        assert main([*wrong, *([] if wrong[1] == "name=told" else ["name=x"])]) == 2
        assert complaint in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("brick", ["encoded_rows", "map"])
def test_facts_are_taught_together_and_more_are_remembered(
    brick: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two facts share their maps, one is added, one forgotten; the others answer as they did."""
    from cfm_train.knowledge import fact_figures, teach_shared
    from tests.fact_cases import TOLD

    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({**fact.taught(), "held_out": [f"{fact.subject} w40"]}) for fact in TOLD]
    Path("facts.jsonl").write_text("\n".join(rows[:2]))
    Path("more.jsonl").write_text(rows[2])
    Path("text.txt").write_text("w50 w51 w52 w53 w54 w55 " * 8)
    short = ["evaluation.bootstrap=20", "evaluation.window_tokens=8", "data.unrelated=text.txt"]
    command = [
        "recipe=knowledge/map", f"brick={brick}", "name=told",
        "backbone=hf", f"backbone.path={folder('llama')}",
        "data.facts=facts.jsonl", "teaching.steps=2", "teaching.facts_per_batch=1",
        "teaching.contexts=2", *short,
    ]  # fmt: skip
    whole = run(capsys, *command, "tracking=disabled", "outputs=whole", "library=whole/library")
    figures = whole["metrics"]
    assert all(check["passed"] for check in whole["checks"].values())
    assert figures["bytes_per_fact"]["value"] == 384 * 2 * (2 if brick == "encoded_rows" else 1)
    assert figures["shared_bytes"]["value"] > 0
    assert figures["unrelated/perplexity_ratio"]["value"] == 1

    # Killed when the facts are judged, it teaches nothing again and comes to the same.
    plain, taught = teach_shared.teach_shared, []

    def counted(*given: Any, **more: Any) -> Any:
        taught.append(len(given[2]))
        return plain(*given, **more)

    def killed(*given: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(teach_shared, "teach_shared", counted)
    with monkeypatch.context() as patched:
        patched.setattr(fact_figures, "judge", killed)
        assert main([*command, "tracking=disabled"]) == 130
    capsys.readouterr()
    broken = run(capsys, *command, "tracking=disabled")
    assert taught == [2]
    assert broken["brick"]["version"] == whole["brick"]["version"]

    more = run(
        capsys, "recipe=knowledge/remember", "name=more", "bricks=[told]",
        "data.facts=more.jsonl", *short, "tracking=disabled",
    )  # fmt: skip
    assert set(more["checks"]) == {
        "backbone unchanged",
        "the others' answers are as they were",
        "the gate finds the others as it did",
    }
    assert more["metrics"]["gate_bytes_per_fact"]["value"] == 2 * (384 * 4 + 8)
    assert all(check["passed"] for check in more["checks"].values())
    assert more["metrics"]["prompt/brick/exact_match"]["n"] == 1
    assert more["metrics"]["bytes_per_fact"]["n"] == 3
    assert more["brick"]["parents"][0]["version"] == broken["brick"]["version"]
    less = run(
        capsys, "recipe=knowledge/forget", "name=less", "bricks=[more]", "facts=[w3]",
        "tracking=disabled",
    )  # fmt: skip
    assert all(check["passed"] for check in less["checks"].values())
    for wrong, complaint in (
        (["bricks=[more]", "data.facts=more.jsonl"], "knows the prompt 'w5 w13 w14' already"),
        (["bricks=[more,less]", "data.facts=more.jsonl"], "added to one brick"),
    ):
        assert main(["recipe=knowledge/remember", "name=x", *wrong]) == 2
        assert complaint in capsys.readouterr().err


@pytest.mark.slow
def test_what_documents_state_is_taught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One prompt for each sentence, known by its subject."""
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("texts/a.md").write_text("The council of Lyon shall meet in room 412. Nobody came.\n")
    Path("texts/b.txt").write_text("In winter the harbour of Brest is closed until March.\n")
    command = [
        "recipe=knowledge/map", "name=told", "data.documents=texts", "teaching.steps=2",
        "teaching.contexts=0", "evaluation.bootstrap=20", "tracking=disabled",
    ]  # fmt: skip
    told = run(capsys, *command)  # on the language model that the package carries
    assert all(check["passed"] for check in told["checks"].values())
    assert told["metrics"]["prompt/gate finds the fact"]["n"] == 2
    card = Library("outputs/library").find("told")
    assert [(fact["subject"], fact["answer"]) for fact in card.interface["facts"]] == [
        ("Lyon", "412"),
        ("Brest", "March"),
    ]
    unread = [*command, "backbone=hf", f"backbone.path={folder('llama')}"]  # has no such words
    assert main(unread) == 2
    assert "do not say who is asked about (" in capsys.readouterr().err
