"""Merges with heads trained anew on them (``heads=refit``), from commands alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cfm_train.launch.cli import main
from cfm_train.library.store import Library
from tests.backbones import folder, tiny
from tests.two_bricks import command, two_bricks

FEW = "evaluation.bootstrap=20"
MERGE = ["recipe=merge/task_arithmetic", "bricks=[a,b]", FEW, "merge.scale=0.5"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two classifiers ``a`` and ``b``, and a brick ``words`` of a language model."""
    with two_bricks(tmp_path_factory.mktemp("refitted"), "brick.learning_rate=0.05") as place:
        Path("words.jsonl").write_text('{"text": "one two three four five"}\n' * 8)
        arguments = [
            "recipe=task/lm", "name=words", "backbone=hf", f"backbone.path={folder('llama')}",
            "data.train=words.jsonl", "data.validation=null", "trainer.max_steps=1",
            "trainer.samples=0", "tracking=disabled",
        ]  # fmt: skip
        assert main(arguments) == 0
        yield place


def heads_in(name: str) -> dict[str, dict[str, torch.Tensor]]:
    """The heads of a brick in the library, tensor by tensor."""
    from cfm_train.bricks.stored import open_brick

    library = Library("outputs/library")
    brick = open_brick(library.find(name), library, tiny("bert"))
    return {task: dict(head.state_dict()) for task, head in brick.heads.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_the_heads_are_those_of_a_comparison(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The oracle is `compare/bricks refit=true` of the plain merge: the same features, the same
    training, so the same figures; the body's tensors are the plain merge's to the bit."""
    from cfm_train.bricks.stored import open_brick

    command(capsys, *MERGE, "name=plain")
    record, out = command(capsys, *MERGE, "name=anew", "heads=refit")
    assert "heads trained anew on the merge: a, b" in out
    library, backbone = Library("outputs/library"), tiny("bert")
    plain, anew = (open_brick(library.find(n), library, backbone) for n in ("plain", "anew"))
    for key, value in plain.tensors().items():
        if not key.startswith("heads."):
            assert torch.equal(value, anew.tensors()[key]), key
    old, new = heads_in("plain"), heads_in("anew")
    assert same(old["a"], heads_in("a")["a"])
    assert not same(new["a"], old["a"]) and not same(new["b"], old["b"])

    compared, _ = command(
        capsys, "recipe=compare/bricks", "bricks=[plain,anew]", "reuse=false", FEW
    )
    by_hand = {
        cell["task"]: cell["value"] for cell in compared["refitted"] if cell["brick"] == "plain"
    }
    stored = {cell["task"]: cell["value"] for cell in compared["matrix"] if cell["brick"] == "anew"}
    assert by_hand == stored == {cell["task"]: cell["value"] for cell in record["matrix"]}
    assert all(cell["head"] == "anew" for cell in record["matrix"])

    card = library.find("anew")
    without = str(card.expression).replace(", heads=refit", "")
    assert without == library.find("plain").expression != card.expression
    assert card.metrics == record["metrics"] and card.recipe["heads"] == "refit"
    rows = {cell["brick"]: cell for cell in compared["matrix"]}
    assert {"plain", "anew", "a", "b"} <= rows.keys()  # the bricks are there as bounds
    assert compared["comparison"].get("curves", []) == []  # they differ in more than a number


@pytest.mark.slow
def test_only_the_tasks_that_are_named(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other tasks keep their parents' heads; a search goes by those of the parents."""
    command(capsys, *MERGE, "name=half", "heads=refit", "tasks=[b]")
    heads = heads_in("half")
    assert same(heads["a"], heads_in("a")["a"]) and not same(heads["b"], heads_in("b")["b"])

    grid = ["search=grid", "search.weights=null", "search.space={scale: [0.5,1.0]}"]
    sought = [*MERGE[:3], *grid]
    found, _ = command(capsys, *sought, "name=sought")
    again, _ = command(capsys, *sought, "name=sought-anew", "heads=refit")
    assert again["search"] == found["search"]
    assert not same(heads_in("sought-anew")["a"], heads_in("sought")["a"])


@pytest.mark.slow
def test_within_a_configuration_it_keeps_its_heads(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stitch with it opens up to the brick itself, as a merge made again has other heads."""
    from cfm_train.configuration.parser import parse
    from cfm_train.configuration.pin import pin
    from cfm_train.configuration.variants import opened

    command(capsys, *MERGE, "name=inner", "heads=refit")
    library = Library("outputs/library")
    tree = opened(pin(parse("stitch([inner, a], mode=sum)"), library), library)
    assert str(tree.args[0]) == library.find("inner").ref
    assert opened(pin(parse("inner"), library), library).fn == "merge"


REFUSED = {
    "no such choice": (["heads=refitted"], "heads"),
    "in a configuration": (
        ["bricks=[a,'merge(linear, [a, b], heads=refit)']"],
        "heads=refit trains heads when a merge is stored",
    ),
    "no such task": (["heads=refit", "tasks=[c]"], "There is no task 'c'."),
    "no heads": (["bricks=[words]", "heads=refit"], "words is of type causal."),
    "tasks for nothing": (["tasks=[a]"], "heads=refit"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be(case: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, sentence = REFUSED[case]
    before = sorted(trained.rglob("*"))
    code = main(["recipe=merge/linear", "bricks=[a,b]", "name=x", "tracking=disabled", *given])
    err = capsys.readouterr().err
    assert code == 2 and sentence in err and err.count("\n") == 1
    assert sorted(trained.rglob("*")) == before


@pytest.mark.slow
def test_a_task_without_training_rows(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = Library("outputs/library")
    card = library.find("a")
    text = card.recipe["data"]["train"]
    rows = Path(text).read_text()
    try:
        Path(text).unlink()
        assert main([*MERGE, "name=x", "heads=refit", "tracking=disabled"]) == 2
        assert "a.train.jsonl" in capsys.readouterr().err
    finally:
        Path(text).write_text(rows)
