"""The YAML of every task: all keys, right types, the real data's labels; every recipe composes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfm_train.config.catalogue import groups, recipes
from cfm_train.config.compose import compose, option
from cfm_train.config.sections import Data
from cfm_train.data.sources import check, check_all

REAL = [
    "sst2",
    "trec",
    "subj",
    "mpqa",
    "agnews",
    "banking77",
    "boolq",
    "cola",
    "mrpc",
    "rte",
    "sms_spam",
    "tweet_emotion",
]
GENERIC = {
    "classify": "classification",
    "multilabel": "multilabel",
    "regress": "regression",
    "tag": "token",
    "lm": "causal",
    "instruct": "instruct",
    "seq2seq": "seq2seq",
}
OPTIONS = sorted(groups()["data"])


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_every_key_of_its_type(name: str) -> None:
    section = option("data", name, **({"name": "mine"} if name == "custom" else {}))
    assert set(section) == set(option("data", "custom", name="mine"))
    Data.model_validate(section)
    assert name == "custom" or section["name"] == name


@pytest.mark.parametrize("name", REAL)
def test_the_twelve_tasks_are_read_from_a_folder(shared: Path, name: str) -> None:
    folder = shared / "data" / "tasks"
    facts = json.loads((folder / "tasks.json").read_text())[name]
    section = option("data", name, root=str(folder))
    checked = check(section)
    assert list(checked.spec.labels or ()) == facts["labels"]
    assert checked.spec.pair == facts["pair"]
    assert len(checked.rows["test"]) == facts["n_test"]
    held = len(checked.rows["train"]) + len(checked.rows["validation"])
    assert held + checked.leaks.total == facts["n_train"]
    assert 0.05 < len(checked.rows["validation"]) / held < 0.15
    assert section["hub"].count("/") == 1 and section["hub_splits"]["train"]
    order = section["hub_labels"]
    assert order is None or sorted(order) == sorted(facts["labels"])


@pytest.mark.parametrize("name", [name for name in OPTIONS if name.startswith("quick_")])
def test_the_tasks_that_the_project_ships(name: str) -> None:
    checked = check(option("data", name))
    assert checked.leaks.total == 0 and not checked.skipped
    assert min(len(rows) for rows in checked.rows.values()) >= 20
    seen = {row["label"] for row in checked.rows["test"]}
    assert seen == set(range(len(checked.spec.labels or ())))


@pytest.mark.parametrize(
    "name", [e.removeprefix("task/") for e in recipes() if e.startswith("task/")]
)
def test_every_task_recipe_composes(name: str, write: Callable[..., str]) -> None:
    entry = recipes()[f"task/{name}"]
    assert entry.purpose and bool(entry.needs) == (name in GENERIC)
    values: dict[str, str] = {"name": "mine", "backbone.path": "x", "data.train": "x.jsonl"}
    config = compose([f"recipe=task/{name}", *(f"{key}={values[key]}" for key in entry.needs)])
    assert config["operation"] == "train"
    Data.model_validate(config["data"])
    if name in GENERIC:
        assert config["data"]["task"] == GENERIC[name]
        assert config["data"]["name"] == "mine"
    else:
        assert config["name"] == config["data"]["name"] == name


ROWS: dict[str, list[dict[str, Any]]] = {
    "classify": [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}],
    "multilabel": [{"text": "x", "labels": ["a", "b"]}],
    "regress": [{"text": "x", "label": 0.5}],
    "tag": [{"tokens": ["x", "y"], "tags": ["B-A", "O"]}],
    "lm": [{"text": "x"}],
    "instruct": [{"question": "x", "answer": "y"}],
    "seq2seq": [{"source": "x", "target": "y"}],
}


@pytest.mark.parametrize("name", GENERIC)
def test_a_persons_file_with_the_columns_of_the_recipe(
    name: str, write: Callable[..., str]
) -> None:
    path = write("a.jsonl", ROWS[name])
    needs = [f"{key}=x" for key in recipes()[f"task/{name}"].needs if key != "data.train"]
    overrides = [*needs, f"data.train={path}", "data.validation_fraction=0.0"]
    data = compose([f"recipe=task/{name}", *overrides])["data"]
    (checked,) = check_all(data)
    assert len(checked.rows["train"]) == len(ROWS[name])
    assert checked.spec.type == GENERIC[name]


def test_multitask_reads_all_its_tasks() -> None:
    tasks = check_all(compose(["recipe=task/multitask", "data.limit=30"])["data"])
    assert [task.spec.name for task in tasks] == option("data", "multitask")["tasks"]
    assert all(len(task.rows["train"]) == 30 for task in tasks)
