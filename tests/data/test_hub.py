"""Hub data sets through the real ``datasets`` package, from folders and its cache: no network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfm_train.data import hub
from cfm_train.data.sources import check
from cfm_train.errors import UserError

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def data_set(tmp_path: Path) -> str:
    """A data set as the Hub holds it: Parquet files with class names in their features."""
    import datasets

    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["bad", "good"]),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "B-X"])),
        }
    )
    for split, size in (("train", 30), ("validation", 6)):
        rows = {
            "sentence": [f"{split} sentence {i}" for i in range(size)],
            "label": [i % 2 for i in range(size)],
            "tags": [[0, 1]] * size,
        }
        folder = tmp_path / "thing"
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return str(tmp_path / "thing")


KEYS: dict[str, Any] = {
    "hub_splits": {"train": "train", "validation": None, "test": "validation"},
    "hub_columns": {"text": "sentence"},
    "validation_fraction": 0.0,
}


def test_class_names_come_from_the_data_set(section: Make, data_set: str) -> None:
    checked = check(section(hub=data_set, **KEYS))
    assert checked.spec.labels == ("bad", "good")
    assert checked.spec.columns == ("sentence",)
    assert [len(checked.rows[split]) for split in ("train", "validation", "test")] == [30, 0, 6]
    assert checked.rows["test"][1] == {
        "text": ["validation sentence 1"],
        "label": 1,
        "_at": f"{data_set}[validation]:2",
    }
    # Another order of our own labels keeps the meaning.
    turned = check(section(hub=data_set, labels=["good", "bad"], **KEYS))
    assert [row["label"] for row in turned.rows["test"]] == [1, 0, 1, 0, 1, 0]
    # What the numbers mean, in words that are not the data set's.
    named = check(section(hub=data_set, labels=["yes", "no"], hub_labels=["no", "yes"], **KEYS))
    assert [row["label"] for row in named.rows["test"]] == [1, 0, 1, 0, 1, 0]


def test_names_of_tags_in_lists(section: Make, data_set: str) -> None:
    keys = {**KEYS, "hub_columns": {"text": "words", "label": "tags"}}
    with pytest.raises(UserError, match=r"data.text: there is no column 'words'"):
        check(section(hub=data_set, task="token", **keys))
    raws = list(hub.read_hub(section(hub=data_set, **keys), "test"))
    assert raws[0].values and raws[0].values["tags"] == ["O", "B-X"]


def test_files_win_over_the_folder_and_the_folder_over_the_hub(
    section: Make, data_set: str, write: Callable[..., str], tmp_path: Path
) -> None:
    mine = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(4)]
    root = [{"text": f"r{i}", "label": "ab"[i % 2]} for i in range(6)]
    write("mine.train.jsonl", root)
    keys = {**KEYS, "hub": data_set}
    from_root = check(section(root=str(tmp_path), **keys))
    assert len(from_root.rows["train"]) == 6
    both = check(section(root=str(tmp_path), train=write("own.jsonl", mine), **keys))
    assert len(both.rows["train"]) == 4 and not both.rows["test"]


def test_a_copy_in_the_cache_needs_no_network(
    section: Make, data_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache as ``datasets`` leaves it after a download, made here from a local folder."""
    import datasets

    cache = tmp_path / "cache"
    datasets.load_dataset(data_set, cache_dir=str(cache))
    (cache / "thing").rename(cache / "someone___thing")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    checked = check(section(hub="someone/thing", **KEYS))
    assert len(checked.rows["train"]) == 30


@pytest.mark.parametrize("offline", ["1", ""])
def test_no_network_is_one_quick_sentence(
    section: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    asked: list[Any] = []  # `datasets` would try for half a minute
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **_: asked.append(args))
    with pytest.raises(UserError) as caught:
        check(section(hub="stanfordnlp/sst2", **KEYS))
    assert not asked
    for part in (
        "data.hub",
        "stanfordnlp/sst2",
        "no network",
        "mine.train.jsonl",
        "data.root=FOLDER",
    ):
        assert part in str(caught.value)


def test_a_split_that_is_not_there(section: Make, data_set: str) -> None:
    keys = {**KEYS, "hub_splits": {"train": "trian", "validation": None, "test": None}}
    with pytest.raises(UserError, match=r"data.hub: cannot load .*trian"):
        check(section(hub=data_set, **keys))
