"""Composition: every recipe and every option, and what a sweep expands to."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from cfm_train import paths
from cfm_train.config import schema, searching, sections, signature
from cfm_train.config.catalogue import groups, recipes
from cfm_train.config.compose import as_yaml, compose, compose_prepared, expand, option
from cfm_train.config.merging import ROOMS, Merging, complete, methods, own_arguments
from cfm_train.config.quoting import decode
from cfm_train.config.validate import METHODS, MISSING, leaves, method_model, validate
from cfm_train.errors import UserError

#: A value for each key that a recipe may ask of a person.
GIVEN = {
    "name": "mine",
    "bricks": "[a,b]",
    "tasks": "[sst2,trec]",
    "out": "out.jsonl",
    "facts": "[Lyon]",
    "data.facts": "facts.jsonl",
    "data.train": "train.jsonl",
    "data.input": "in.jsonl",
    "data.tasks": "[sst2,trec]",
    "backbone.path": "folder",
}
SECTIONS = {
    "backbone": sections.Backbone,
    "data": sections.Data,
    "trainer": sections.Trainer,
    "evaluation": sections.Evaluation,
    "tracking": sections.Tracking,
}
NEED_A_PATH = {("backbone", "hf"), *(("encoder", n) for n in ("vision", "speech", "patchtst"))}
NEED_NUMBERS = {("encoder", "vectors"), ("encoder", "callable")}
OPTIONS = [(group, name) for group, options in groups().items() for name in options]


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_composes_and_fits_its_schema(name: str) -> None:
    needs = [f"{key}={GIVEN.get(key, 'given')}" for key in recipes()[name].needs]
    config = validate(compose([f"recipe={name}", *needs]))
    assert config["recipe"] == name
    assert MISSING not in [value for _, value in leaves(config)]


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_says_what_it_is_for_and_what_it_needs(name: str) -> None:
    entry = recipes()[name]
    assert 10 < len(entry.purpose) <= 120
    if entry.needs:
        with pytest.raises(UserError, match="is missing"):
            validate(compose([f"recipe={name}"]))


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_fits_its_schema(group: str, name: str) -> None:
    assert groups()[group][name].purpose
    given = {"name": "x"} if (group, name) == ("data", "custom") else {}
    given |= {"path": "x"} if (group, name) in NEED_A_PATH else {}
    given |= {"numbers": 8} if (group, name) in NEED_NUMBERS else {}
    given |= {"target": "a.b"} if (group, name) == ("encoder", "callable") else {}
    given |= {"learning_rate": 0.1} if group == "trainer" else {}
    if group == "sparsify":
        complete("linear", {"sparsify": name})
        return
    if group == "rule":
        complete(name, {})
        return
    if group == "search":
        searching.model_of(name).model_validate(option(group, name))
        return
    section = option(group, name, **given)
    kind = method_model(group, section["kind"]) if group in METHODS else SECTIONS[group]
    kind.model_validate(section)


@pytest.mark.parametrize("key", ["rule", "sparsify"])
def test_every_merge_method_has_a_yaml_and_parameters_of_its_own(key: str) -> None:
    assert set(methods(key)) <= groups()[key].keys()
    other = "sparsify" if key == "rule" else "rule"
    taken = {p for name in methods(other) for p in own_arguments(ROOMS[other][0], name)}
    for name in methods(key):
        assert not own_arguments(ROOMS[key][0], name).keys() & (taken | Merging.model_fields.keys())


@pytest.mark.parametrize(
    ("key", "kind"),
    [(key, kind) for key, where in METHODS.items() for kind in signature.kinds(*where)],
)
def test_every_kind_of_a_method_has_a_yaml(key: str, kind: str) -> None:
    texts = [one.path.read_text(encoding="utf-8") for one in groups()[key].values()]
    assert any(f"\nkind: {kind}\n" in text for text in texts)


def test_heads_learn_at_one_rate_alone_and_on_a_brick() -> None:
    """Else the lower bound and the brick above it would not have the same budget."""
    alone = option("brick", "head")["learning_rate"]
    assert option("trainer", "default", learning_rate=0.1)["head_learning_rate"] == alone


def test_the_recipe_wins_over_the_root_and_a_person_over_the_recipe() -> None:
    config = compose(["recipe=task/sst2", "trainer=quick", "brick=head", "seed=7"])
    assert (config["seed"], config["name"], config["recipe"]) == (7, "sst2", "task/sst2")
    assert config["brick"]["kind"] == "head"
    assert config["trainer"]["max_steps"] == 60
    assert config["trainer"]["learning_rate"] == config["brick"]["learning_rate"]


def test_the_library_follows_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CFM_LIBRARY", raising=False)
    assert compose(["recipe=task/sst2"])["library"] == "outputs/library"
    monkeypatch.setenv("CFM_LIBRARY", "elsewhere")
    assert compose(["recipe=task/sst2"])["library"] == "elsewhere"


def test_a_choice_that_a_recipe_leaves_open_can_be_made() -> None:
    base = ["recipe=evaluate/tasks", "bricks=[a]", "tasks=[sst2]"]
    assert compose(base)["backbone"] is None
    assert compose([*base, "backbone=minilm"])["backbone"]["id"] == "minilm"


def test_a_choice_for_a_section_of_another_name_can_be_made() -> None:
    """``group@section``: the gate's sentence encoder is a backbone too."""
    base = [
        "recipe=knowledge/facts",
        "name=a",
        "backbone=hf",
        "backbone.path=lm",
        "data.facts=f.jsonl",
    ]
    assert compose(base)["sentence_encoder"]["id"] == "minilm"
    chosen = compose([*base, "backbone@sentence_encoder=hf", "sentence_encoder.path=some/encoder"])
    assert chosen["sentence_encoder"]["path"] == "some/encoder"
    assert chosen["sentence_encoder"]["package"] is None and chosen["backbone"]["path"] == "lm"
    swept = map(compose_prepared, expand([*base, "backbone@sentence_encoder=minilm,hf"]))
    assert [bool(one["sentence_encoder"]["package"]) for one in swept] == [True, False]
    with pytest.raises(
        UserError,
        match=r"^backbone@sentence_encoder=minlm: .* no backbone 'minlm'\. Did you mean 'minilm'",
    ):
        compose([*base, "backbone@sentence_encoder=minlm"])
    with pytest.raises(UserError, match="backbone@encoder is a choice that this recipe does not"):
        compose([*base, "backbone@encoder=minilm"])


def test_glob_takes_what_runs_by_itself_and_leaves_out_what_needs_a_person() -> None:
    ready = [name for name, one in recipes().items() if name.startswith("task/") and not one.needs]
    jobs = expand(["recipe=glob(task/*)", "seed=1,2,3"])
    assert [decode(job) for job in jobs] == [
        [f"recipe={name}", f"++seed={seed}"] for name in ready for seed in (1, 2, 3)
    ]
    assert len(ready) >= 12
    assert "task/classify" not in ready


def test_a_sweep_over_ranges_and_recipes() -> None:
    jobs = expand(["recipe=task/sst2,task/trec", "brick.rank=range(2,5)"])
    assert len(jobs) == 6
    assert jobs[-1] == ["recipe=task/trec", "++brick.rank=4"]
    assert validate(compose(["recipe=task/trec", "brick.rank=4"]))["brick"]["rank"] == 4


def test_an_option_with_values_in_it() -> None:
    section = option("data", "sst2", root="it's a ${folder}")
    assert section["root"] == "it's a ${folder}"
    assert section["name"] == "sst2"
    with pytest.raises(
        UserError, match=r"^data\.rot is no key of data 'sst2'\. Did you mean 'data"
    ):
        option("data", "sst2", rot="x")
    with pytest.raises(
        UserError, match=r"^data=sst3: there is no data 'sst3'\. Did you mean 'sst2'"
    ):
        option("data", "sst3")


@pytest.mark.parametrize("name", ["1e5", "1_000", "null", "yes", "2026-01-01", "a: b", "0o17", "~"])
def test_the_printed_run_reads_back_as_it_was(name: str, tmp_path: Path) -> None:
    config = validate(compose(["recipe=task/sst2", f"name={name}"]))
    text = as_yaml(config)
    assert yaml.safe_load(text) == config
    (tmp_path / "config.yaml").write_text(text)
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml")) == config


def test_no_default_stands_in_the_schema() -> None:
    for model in [*schema.OPERATIONS.values(), *SECTIONS.values()]:
        assert all(field.is_required() for field in model.model_fields.values())


def test_yaml_files_end_in_yaml() -> None:
    for folder in ("conf", "recipes"):
        strays = [path for path in (paths.ROOT / folder).rglob("*") if path.is_file()]
        assert {path.suffix for path in strays} == {".yaml"}
