"""Every wrong input is one sentence: the key, what was given, what is valid, the nearest name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cfm_train import paths
from cfm_train.config import catalogue, compose
from cfm_train.config.validate import validate
from cfm_train.errors import UserError

TRAIN = ("recipe=task/classify", "name=x", "data.train=a.jsonl")
EVALUATE = ("recipe=evaluate/tasks", "bricks=[a]", "tasks=[b]")

WRONG = {
    (): "No recipe given: add recipe=<what>/<name>; --help lists them.",
    ("name=x",): "No recipe given: add recipe=<what>/<name>; --help lists them.",
    (
        "recipe=task/clasify",
    ): "recipe=task/clasify: there is no recipe 'task/clasify'. Did you mean 'task/classify'?",
    ("recipe=sst2",): "recipe=sst2: there is no recipe 'sst2'. Did you mean 'task/sst2'?",
    (
        "recipe=task/classify",
        "data.train=a.jsonl",
    ): "name is missing: recipe 'task/classify' needs it, add name=…",
    ("recipe=evaluate/tasks",): "bricks is missing: recipe 'evaluate/tasks' needs it, add bricks=…",
    (
        "recipe=predict",
        "bricks=[a]",
    ): "out (and data.input) is missing: recipe 'predict' needs it, add out=…",
    (
        *TRAIN,
        "backbone=hf",
    ): "backbone.path is missing: recipe 'task/classify' needs it, add backbone.path=…",
    (
        "recipe=task/classify",
        "nme=x",
    ): "nme is no key of operation train. Did you mean 'name'?",
    (*TRAIN, "brick.rnk=8"): "brick.rnk is no key of brick 'lora'. Did you mean 'brick.rank'?",
    (*TRAIN, "+brick.rnk=8"): "brick.rnk is no key of brick 'lora'. Did you mean 'brick.rank'?",
    (
        *TRAIN,
        "trainer.epoch=1",
    ): "trainer.epoch is no key of trainer. Did you mean 'trainer.epochs'?",
    (
        *TRAIN,
        "data.hub_splits.tst=x",
    ): "data.hub_splits.tst is no key of data.hub_splits. Did you mean 'data.hub_splits.test'?",
    (*TRAIN, "trainer.lr=1e-3"): (
        "trainer.lr is no key of this run: it is called brick.learning_rate here."
    ),
    (*TRAIN, "lr=1e-3"): "lr is no key of this run: it is called brick.learning_rate here.",
    (*TRAIN, "brick.r=4"): "brick.r is no key of this run: it is called brick.rank here.",
    (
        *TRAIN,
        "weights=[1,2]",
    ): "weights is a key of operation merge and merge_models, not of train.",
    (
        *EVALUATE,
        "out=x",
    ): "out is a key of operation pretrain, predict, merge_models and stitch_layers, "
    "not of evaluate.",
    (
        *EVALUATE,
        "trainer.epochs=1",
    ): "trainer is a key of operation train, study, pretrain, align, instruct and stitch_bridge, "
    "not of evaluate.",
    (*TRAIN, "brick=lorra"): "brick=lorra: there is no brick 'lorra'. Did you mean 'lora'?",
    (
        *TRAIN,
        "brick.kind=lorra",
    ): "brick.kind: there is no brick kind 'lorra'. Did you mean 'lora'?",
    (
        *EVALUATE,
        "brick=lora",
    ): "brick is a choice that this recipe does not have: leave it out or take another recipe.",
    (
        *TRAIN,
        "operation=merge",
    ): "operation is what a recipe says: leave it out and choose the recipe.",
    (*TRAIN, "seed=abc"): "seed='abc' does not fit: it must be a whole number.",
    (*TRAIN, "seed=-1"): "seed=-1 does not fit: it must be greater than or equal to 0.",
    (*TRAIN, "seed=1.5"): "seed=1.5 does not fit: it must be a whole number.",
    (*TRAIN, "seed=true"): "seed=true does not fit: it must be a whole number.",
    (*TRAIN, "dry_run=yes"): "dry_run='yes' does not fit: it must be true or false.",
    (
        *TRAIN,
        "trainer.max_steps=many",
    ): "trainer.max_steps='many' does not fit: it must be a whole number.",
    (
        *TRAIN,
        "trainer.schedule=linaer",
    ): "trainer.schedule='linaer' does not fit: it must be linear, cosine or constant.",
    (*TRAIN, "brick.alpha=nan"): "brick.alpha=nan does not fit: it must be a finite number.",
    (*TRAIN, "brick.rank=[8]"): "brick.rank=[8] does not fit: it must be a whole number.",
    (
        *TRAIN,
        "data.validation_fraction=1.0",
    ): "data.validation_fraction=1.0 does not fit: it must be less than 1.",
    (*TRAIN, "name=a/b"): "name='a/b' does not fit: it must be a name without slashes.",
    (
        *TRAIN,
        "backbone.sha256=12",
    ): "backbone.sha256='12' does not fit: it must be 64 hexadecimal digits.",
    (*TRAIN, "~data.label"): "data.label is missing from recipe 'task/classify': add data.label=…",
    (
        *TRAIN,
        "seed=1,2",
    ): "seed=1,2 names several values: put -m first to run each, or write [a,b] for a list.",
    (*TRAIN, "trainer.epochs=[1"): "trainer.epochs=[1: a bracket [] is not closed.",
    (*TRAIN, "foo"): "'foo' is no override: write key=value; --help shows the keys.",
    (*TRAIN, "=3"): "'=3' is no override: write key=value; --help shows the keys.",
    (
        *TRAIN,
        "data.max_length=${nope}",
    ): "data.max_length: Interpolation key 'nope' not found.",
}


@pytest.mark.parametrize("overrides", WRONG, ids=lambda given: " ".join(given) or "nothing")
def test_wrong_overrides(overrides: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        validate(compose.compose(overrides))
    assert str(caught.value) == WRONG[overrides]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["recipe=glob(tsk/*)"], "recipe=glob(tsk/*) matches nothing."),
        (
            ["recipe=task/sst2", "seed=interval(0,1)"],
            "seed=interval(0,1) has no end of values to run: use range(start,stop,step).",
        ),
        (["seed=1,2"], "No recipe given: add recipe=<what>/<name>; --help lists them."),
    ],
)
def test_wrong_sweeps(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        compose.expand(overrides)
    assert str(caught.value) == sentence


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the YAML folders that a test may spoil."""
    for folder in ("conf", "recipes"):
        shutil.copytree(paths.ROOT / folder, tmp_path / folder)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    catalogue._entries.cache_clear()
    return tmp_path


def test_broken_yaml_names_file_and_line(checkout: Path) -> None:
    path = checkout / "recipes/task/sst2.yaml"
    path.write_text("# Broken\nname: x\nseed: [1, 2\nother: 3\n")
    with pytest.raises(UserError) as caught:
        compose.compose(["recipe=task/sst2"])
    assert str(caught.value).startswith(f"{path}, line 4: not valid YAML, expected ',' or ']'")
    path = checkout / "conf/trainer/default.yaml"
    path.write_text("# Broken\nepochs: 1\n  warmup: 2\n")
    with pytest.raises(UserError) as caught:
        compose.compose(["recipe=task/trec"])
    assert str(caught.value) == (
        f"{path}, line 3: not valid YAML, mapping values are not allowed here."
    )


def test_a_recipe_that_names_an_option_that_is_not_there(checkout: Path) -> None:
    path = checkout / "recipes/task/sst2.yaml"
    path.write_text("# Wrong\ndefaults:\n  - /brick: lorra\n  - _self_\noperation: train\n")
    with pytest.raises(UserError) as caught:
        compose.compose(["recipe=task/sst2"])
    assert str(caught.value) == (
        "recipe/task/sst2: there is no brick 'lorra'. Did you mean 'lora'?"
    )


def test_a_recipe_with_an_unknown_operation(checkout: Path) -> None:
    (checkout / "recipes/task/sst2.yaml").write_text("# Wrong\noperation: trian\nname: x\n")
    with pytest.raises(UserError) as caught:
        validate(compose.compose(["recipe=task/sst2"]))
    assert str(caught.value) == "operation: there is no operation 'trian'. Did you mean 'train'?"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("# Empty\n", "Recipe 'task/sst2' names no operation: add one to its YAML."),
        ("- a\n", "{path}: a recipe is a mapping of keys, not a list."),
        ("name: x\nname: y\n", "{path}, line 2: not valid YAML, found duplicate key name."),
        (
            "operation: train\nname: ${\n",
            "name: an interpolation ${…} in it is not closed or cannot be read.",
        ),
        ("operation: train\nname: ${nope}\n", "name: Interpolation key 'nope' not found."),
    ],
)
def test_recipes_that_cannot_be_used(checkout: Path, text: str, sentence: str) -> None:
    path = checkout / "recipes/task/sst2.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        validate(compose.compose(["recipe=task/sst2"]))
    assert str(caught.value) == sentence.replace("{path}", str(path))


def test_a_new_recipe_is_found_by_its_file(checkout: Path) -> None:
    path = checkout / "recipes/mine/deep/one.yaml"
    path.parent.mkdir(parents=True)
    path.write_text((checkout / "recipes/task/sst2.yaml").read_text() + "seed: 5\n")
    assert validate(compose.compose(["recipe=mine/deep/one"]))["seed"] == 5
    assert len(compose.expand(["recipe=glob(mine/*)"])) == 1
