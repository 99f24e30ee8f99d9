"""Stitches in the library: without tensors, opened from their expression, nested both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cfm_train
from cfm_train.bricks.heads import Head
from cfm_train.bricks.stored import store
from cfm_train.configuration.apply import assemble
from cfm_train.configuration.opened import opened_from
from cfm_train.configuration.parser import parse
from cfm_train.configuration.pin import pin
from cfm_train.errors import UserError
from cfm_train.launch.cli import main
from cfm_train.library.__main__ import main as library_main
from cfm_train.library.card import STITCH, Card
from cfm_train.library.store import Library
from cfm_train.stitching.fold import fold
from cfm_train.stitching.stitch import Stitch, stitch_bricks
from tests.backbones import batch, section, tiny
from tests.brick_laws import plugged, random_brick
from tests.lora_cases import lora

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
#: LoRA at sites that are as wide as their input.
BRICKS = {"a": 4, "b": 2, "c": 3}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """A library of three bricks, of which two have a head."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CFM_LIBRARY", raising=False)
    backbone, shelf = tiny("bert"), Library("outputs/library")
    for seed, (name, rank) in enumerate(BRICKS.items()):
        brick = random_brick(
            lambda b, rank=rank: lora(b, sites=["attn.q", "attn.o"], rank=rank),  # type: ignore[misc]
            backbone,
            seed,
            0.2,
        )
        if name != "c":
            brick.add_head(f"task-{name}", Head("classification", ["x", "y"], 32, "mean"))
        recipe = {"backbone": section("bert")}
        store(brick, shelf, backbone, name=name, operation="train", recipe=recipe)
    return shelf


def stitched(library: Library, name: str, expression: str) -> Card:
    """A stitch as the operation stores it."""
    backbone = tiny("bert")
    tree = pin(parse(expression), library)
    brick = assemble(tree, library, backbone)
    assert isinstance(brick, Stitch)
    parents = [{"name": n, "version": library.find(n).version} for n in "ab"]
    return store(
        brick, library, backbone, name=name, operation="stitch", expression=str(tree),
        parents=parents,
    )  # fmt: skip


def outputs(library: Library, expression: str) -> torch.Tensor:
    backbone = tiny("bert")
    brick = assemble(parse(expression), library, backbone)
    return plugged(backbone, [brick], batch(backbone))


def test_stored_opened_and_loaded(library: Library) -> None:
    card = stitched(library, "ab", "stitch([a, b])")
    a, b = (library.find(name) for name in "ab")
    assert card.kind == STITCH and set(card.files) == {"README.md", "heads.safetensors"}
    assert card.expression == f"stitch([{a.ref}, {b.ref}], mode=chain)"
    assert card.interface["expression"] == card.expression
    assert card.requires == [tiny("bert").fingerprint]
    assert set(card.heads) == {"task-a", "task-b"}
    assert not library.verify("ab")
    by_hand = stitch_bricks("chain", [assemble(parse(n), library, tiny("bert")) for n in "ab"],
                            tiny("bert"))  # fmt: skip
    inputs = batch(tiny("bert"))
    expected = plugged(tiny("bert"), [by_hand], inputs)
    assert torch.equal(outputs(library, "ab"), expected)
    assert torch.equal(outputs(library, f"ab@{card.version[:5]}"), expected)
    model = cfm_train.load(section("bert"), "ab", head="task-b", dtype="float32")
    with torch.inference_mode():
        found = model(**inputs).logits
        head = by_hand.head_for("task-b")
        assert head is not None
        torch.testing.assert_close(found, head(expected, inputs["attention_mask"]), **CLOSE)
    again = stitched(library, "again", "stitch([a, b], mode=chain)")
    assert again.version == card.version, "the same stitch under two names is one version"
    assert stitched(library, "ba", "stitch([b, a])").version != card.version


def test_nested_both_ways(library: Library) -> None:
    """A merge inside a stitch, a stitch inside a merge, a stitch of the library inside both."""
    backbone = tiny("bert")
    stitched(library, "ab", "stitch([a, b])")
    inputs = batch(backbone)

    def open_(text: str) -> Any:
        return assemble(parse(text), library, backbone)

    merged = open_("merge(linear, [b, c], weights=[0.3, 0.7])")
    expected = plugged(backbone, [stitch_bricks("chain", [open_("a"), merged], backbone)], inputs)
    found = outputs(library, "stitch([a, merge(linear, [b, c], weights=[0.3, 0.7])])")
    torch.testing.assert_close(found, expected, **CLOSE)

    folded, c = fold(open_("ab"), backbone), open_("c")
    expected = plugged(backbone, [folded, c], inputs, [0.3, 0.7])
    for text in ("stitch([a, b])", "ab"):
        found = outputs(library, f"merge(linear, [{text}, c], weights=[0.3, 0.7])")
        torch.testing.assert_close(found, expected, **CLOSE)

    found = outputs(library, "stitch([ab, c])")
    torch.testing.assert_close(found, outputs(library, "stitch([a, b, c])"), **CLOSE)


def test_a_brick_that_a_stitch_needs_stays(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    card = stitched(library, "ab", "stitch([a, b])")
    a = library.find("a")
    assert [one.name for one in opened_from(card, library)] == ["ab", "a", "b"]
    assert library_main(["rm", "a"]) == 2
    refused = capsys.readouterr().err
    assert f"{card.ref} can never be opened again" in refused and "--force" in refused
    assert library.gc(grace=0) == [] and library.find("a").ref == a.ref
    assert library_main(["export", "ab", "out"]) == 2 and not Path("out").exists()
    assert "stitch them again with fold=true" in capsys.readouterr().err
    assert library_main(["rm", "a", "--force"]) == 0
    assert f"{card.ref} was stitched from it" in capsys.readouterr().err
    (problem,) = library.verify("ab")
    assert problem.ref == card.ref and "cannot be opened" in problem.sentence
    with pytest.raises(UserError, match=rf"{card.ref} = .* cannot be opened: There is no 'a'"):
        outputs(library, "ab")
    before = sorted(Path().rglob("*"))
    code = main(["recipe=evaluate/tasks", "bricks=[ab]", "tasks=[quick_tone]", "tracking=disabled"])
    assert code == 2 and "is a stitch" in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before


def test_the_operation(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    """Two stitches, one of them folded; what the record and the terminal say."""
    for name, more in (("ab", []), ("one", ["fold=true"])):
        code = main(
            ["recipe=stitch/pipe", "bricks=[a,b]", f"name={name}", "tracking=disabled", *more]
        )
        out, err = capsys.readouterr()
        assert code == 0, err
        record = json.loads(Path(out.splitlines()[-1].removeprefix("record: ")).read_text())
        assert "order effect: the opposite order changes" in out
        assert record["metrics"]["order effect"]["value"] > 0.01
        assert all(check["passed"] for check in record["checks"].values())
        assert {"unplugged equals bare", "backbone unchanged"} < record["checks"].keys()
        assert [p["name"] for p in record["brick"]["parents"]] == ["a", "b"]
    folded = library.find("one")
    assert folded.kind == "lora" and folded.expression == library.find("ab").expression
    assert folded.interface["hyper"]["rank"] == 4
    assert set(folded.heads) == {"task-a", "task-b"}
    torch.testing.assert_close(outputs(library, "one"), outputs(library, "ab"), **CLOSE)


def test_a_merge_in_a_stitch_from_the_command_line_to_load(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    """One expression on the command line, in the card, in `load`, in a record: one brick."""
    backbone, inputs = tiny("bert"), batch(tiny("bert"))
    inner = "merge(ties, [b, c], density=0.5)"
    command = ["recipe=stitch/chain", f'bricks=[a,"{inner}"]', "name=nested", "tracking=disabled"]
    assert main(command) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    record = json.loads(Path(out.splitlines()[-1].removeprefix("record: ")).read_text())
    card = library.find("nested")
    tree = pin(parse(f"stitch([a, {inner}])"), library)
    assert card.expression == card.interface["expression"] == str(tree)
    assert "elect=" in card.expression and "mode=chain" in card.expression, "nothing left open"
    assert [p["name"] for p in record["brick"]["parents"]] == ["a", "b", "c"]
    assert set(card.heads) == {"task-a", "task-b"} and not library.verify("nested")
    assert card.recipe["bricks"] == ["a", inner]
    parts = [assemble(parse(text), library, backbone) for text in ("a", inner)]
    expected = plugged(backbone, [stitch_bricks("chain", parts, backbone)], inputs)
    assert (expected - outputs(library, "a")).abs().max() > 1e-3
    for configuration in ("nested", f"stitch([a, {inner}])", str(tree)):
        model = cfm_train.load(section("bert"), configuration, head="task-b", dtype="float32")
        with torch.inference_mode():
            found = model.backbone.hidden_states(**inputs)  # type: ignore[attr-defined]
        assert torch.equal(found, expected)
