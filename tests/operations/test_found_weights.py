"""Merges with found weights from commands alone: record, card, determinism, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cfm_train.backbone.load import Backbone
from cfm_train.config.searching import methods
from cfm_train.launch.cli import main
from cfm_train.library.store import Library
from tests.backbones import section, tiny
from tests.two_bricks import command, two_bricks

FEW = {
    "grid": ["search.weights=[0.0,1.0]", "search.space={scale: [0.5,1.0]}"],
    "bayes": ["search.trials=3", "search.initial=2"],
    "gradient": ["search.steps=2", "search.every=1"],
    "adamerging": ["search.steps=2", "search.every=1", "search.learning_rate=0.1"],
    "lorahub": ["search.trials=3"],
    "cma_es": ["search.trials=3", "search.space={scale: [0.2,1.0]}"],
}
TRIALS = {"grid": 8}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two bricks ``a`` and ``b``, each with its task's files."""
    with two_bricks(tmp_path_factory.mktemp("found")) as place:
        yield place


@pytest.fixture(scope="module")
def backbone(trained: Path) -> Backbone:
    return tiny("bert")


def test_every_search_is_run_here() -> None:
    assert set(FEW) == set(methods())


@pytest.mark.slow
@pytest.mark.parametrize("kind", FEW)
def test_a_search_of_a_few_trials(
    kind: str, trained: Path, backbone: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record holds every trial; the expression is the brick; other test labels change nothing.

    The second run has other answers in its test files and another folder, and must come to the very
    same brick: weights never depend on test labels, and the same seed gives the same result.
    """
    from cfm_train.bricks.stored import open_brick
    from cfm_train.configuration.apply import assemble
    from cfm_train.configuration.parser import parse

    asked = [
        "recipe=merge/linear", "bricks=[a,b]", f"name=by-{kind}", f"search={kind}",
        "evaluation.bootstrap=20", *FEW[kind],
    ]  # fmt: skip
    record, out = command(capsys, *asked)
    search = record["search"]
    assert search["method"] == kind and len(search["trials"]) == TRIALS.get(kind, 3)
    sign = 1 if search["lower_is_better"] else -1
    costs = [sign * one["value"] + one["penalty"] for one in search["trials"]]
    assert costs[search["chosen"]] == min(costs)
    first = search["trials"][0]["scores"]  # the start, of which a relative loss is a share
    units = first if search["objective"] == "relative loss" else dict.fromkeys(first, 1.0)
    assert (kind == "gradient") == (search["objective"] == "relative loss")
    for one in search["trials"]:
        shares = [score / units[task] for task, score in one["scores"].items()]
        assert one["value"] == pytest.approx(sum(shares) / 2)
        assert set(one["scores"]) == {"a", "b"} and list(one["point"]) == search["axes"]
    assert record["backbone"]["unchanged"]
    assert all(check["passed"] for check in record["checks"].values())
    assert [c["task"] for c in record["matrix"]] == ["a", "b"]
    assert record["metrics"]["test/a/accuracy"]["n"] == record["matrix"][0]["n"]
    adapts = kind == "adamerging"
    assert search["chosen_on"] == ("test inputs" if adapts else "validation")
    assert f"weights chosen on {search['chosen_on']}" in out
    page = Path(out.splitlines()[-2].removeprefix("dashboard: ")).read_text()
    assert f'"chosen_on":"{search["chosen_on"]}"' in page

    library = Library("outputs/library")
    card = library.find(f"by-{kind}")
    assert card.recipe["search"]["chosen_on"] == search["chosen_on"]
    assert card.metrics == record["metrics"]
    readme = (library.folder(card) / "README.md").read_text()
    assert f"weights found by {kind}, chosen on {search['chosen_on']}" in readme
    for text in (readme, out, page):
        assert ("adapts on test inputs" in text) is adapts
    again = assemble(parse(str(card.expression)), library, backbone).state_dict()
    stored = open_brick(card, library, backbone).state_dict()
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)

    texts = {path: path.read_text() for path in trained.glob("*.test.jsonl")}
    try:
        for path, text in texts.items():
            turned = text.replace('"no"', '"?"').replace('"yes"', '"no"').replace('"?"', '"yes"')
            path.write_text(turned)
        other, _ = command(capsys, *asked, "outputs=elsewhere")
    finally:
        for path, text in texts.items():
            path.write_text(text)
    assert other["inputs"] != record["inputs"]
    assert other["search"] == search
    assert other["brick"]["version"] == record["brick"]["version"]
    assert other["metrics"] != record["metrics"]

    compared, _ = command(
        capsys, "recipe=evaluate/tasks", f"bricks=[a,'merge(linear, [by-{kind}, b])']",
        "evaluation.bootstrap=20",
    )  # fmt: skip
    notes = [cell.get("note") for cell in compared["matrix"]]
    assert notes == [None, None, *["adapts on test inputs" if adapts else None] * 2]


REFUSED = {
    "no such search": (["search=gird"], "there is no search 'gird'"),
    "no key of it": (["search=grid", "search.trials=3"], "search.trials is no key"),
    "a rule that is no sum": (["rule=ties", "search=gradient"], "rule=ties is none"),
    "sparsified": (["sparsify=dare", "search=adamerging"], "set sparsify=none"),
    "cut to a rank": (["merge.rank=2", "search=gradient"], "set merge.rank=null"),
    "other space": (["merge.space=parameters", "search=gradient"], "merge.space=delta"),
    "tasks without a search": (["tasks=[a]"], "add search=grid"),
    "a task without a head": (
        ["search=grid", "tasks=[quick_tone]"],
        "None of the bricks has a head for the task 'quick_tone'",
    ),
    "a wrong objective": (
        ["search=adamerging", "search.objective=loss"],
        "search.objective='loss' does not fit",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_found(case: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, sentence = REFUSED[case]
    before = sorted(trained.rglob("*"))
    code = main(["recipe=merge/linear", "bricks=[a,b]", "name=x", "tracking=disabled", *given])
    err = capsys.readouterr().err
    assert code == 2 and sentence in err and err.count("\n") == 1
    assert sorted(trained.rglob("*")) == before


@pytest.mark.slow
def test_bricks_and_rows_that_are_missing(
    trained: Path, backbone: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    """No head, no validation rows, no low-rank update: refused, the last before torch."""
    from cfm_train.bricks.kinds import make_brick
    from cfm_train.bricks.stored import store
    from cfm_train.config.compose import option

    library = Library("outputs/library")
    for name, kind in (("bare", "lora"), ("scaled", "ia3")):
        brick = make_brick(option("brick", kind)).build(backbone)
        known = {"name": name, "operation": "add", "recipe": {"backbone": section("bert")}}
        store(brick, library, backbone, **known)
    start = ["recipe=merge/linear", "name=x", "tracking=disabled"]
    before = sorted(trained.rglob("*"))
    assert main([*start, "bricks=[a,bare]", "search=grid"]) == 2
    assert "has no head and no task of its own" in capsys.readouterr().err
    assert main([*start, "bricks=[scaled]", "search=gradient"]) == 2
    assert "is of kind ia3" in capsys.readouterr().err
    card = library.find("a")
    data = {**card.recipe["data"], "validation_fraction": 0.0}
    Path(library.folder(card) / "brick.json").write_text(
        json.dumps({**card.to_dict(), "recipe": {**card.recipe, "data": data}})
    )
    code = (
        "import sys\nfrom cfm_train.launch.cli import main\n"
        f"code = main({[*start, 'bricks=[a,b]', 'search=grid']!r})\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    finally:
        Path(library.folder(card) / "brick.json").write_text(card.to_json())
    assert done.returncode == 2, done.stderr
    assert "'a' has no validation rows, and weights are chosen on it" in done.stderr
    assert sorted(trained.rglob("*")) == before
