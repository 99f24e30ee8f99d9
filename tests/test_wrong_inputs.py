"""Wrong inputs: each one clear sentence, exit code 2, and nothing changed on disk."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cfm_train.launch.cli import main
from cfm_train.library.__main__ import main as library_main
from tests.backbones import folder, tiny

CLASSIFY = ["recipe=task/classify", "name=mine", "tracking=disabled"]
OWN = [*CLASSIFY, "data.train=a.jsonl"]
EVALUATE = ["recipe=evaluate/tasks", "tasks=[quick_tone]", "tracking=disabled"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder with a good data file in it, and a library of one brick."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"w{i} w{i + 1}", "label": ("yes", "no")[i % 2]} for i in range(3, 40)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield tmp_path


def stored_brick(name: str = "kept", family: str = "bert") -> Path:
    """Puts a LoRA brick for a tiny backbone into ``outputs/library``; returns its folder."""
    from cfm_train.bricks.kinds import make_brick
    from cfm_train.bricks.stored import store
    from cfm_train.config.compose import option
    from cfm_train.library.store import Library
    from tests.backbones import section

    backbone = tiny(family)
    brick = make_brick(option("brick", "lora")).build(backbone)
    library = Library("outputs/library")
    recipe = {"backbone": section(family)}
    card = store(brick, library, backbone, name=name, operation="train", recipe=recipe)
    return Path(library.folder(card))


def snapshot(root: Path) -> dict[str, str]:
    """Every file below a folder with its hash, and every folder."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(root.rglob("*"))
    }


def lines(*rows: Any) -> str:
    """JSON lines; a text stands as it is."""
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)


def spoil_data(text: str) -> Callable[[], list[str]]:
    """A case whose training file has this content."""

    def prepare() -> list[str]:
        Path("a.jsonl").write_text(text)
        return OWN

    return prepare


def backbone_of(change: Callable[[Path], None]) -> Callable[[], list[str]]:
    """A case whose backbone folder was changed."""

    def prepare() -> list[str]:
        shutil.copytree(folder("bert"), "model")
        change(Path("model"))
        return [*OWN, "backbone=hf", "backbone.path=model"]

    return prepare


def truncated(path: Path) -> None:
    """Cuts the weights short."""
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(path: Path) -> None:
    """Leaves only a pickle."""
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def brick_with(change: Callable[[Path], None]) -> Callable[[], list[str]]:
    """A case in which a stored brick's tensor file was changed."""

    def prepare() -> list[str]:
        change(stored_brick() / "adapter_model.safetensors")
        return [*EVALUATE, "bricks=[kept]"]

    return prepare


def with_nan(path: Path) -> None:
    """Puts a NaN into the first tensor."""
    tensors = load_file(path)
    first = min(tensors)
    tensors[first] = np.full_like(tensors[first], np.nan)
    save_file(tensors, path)


def other_backbone() -> list[str]:
    """A brick asked for on another backbone than its own."""
    stored_brick()
    path = folder("llama")
    return [*EVALUATE, "bricks=[kept]", "backbone=hf", f"backbone.path={path}"]


def one_weight() -> list[str]:
    """A merge with too few weights."""
    stored_brick("kept")
    stored_brick("also")
    return ["recipe=merge/linear", "bricks=[kept,also]", "weights=[1.0]", "name=m"]


def merge_that_is_none(*choices: str) -> Callable[[], list[str]]:
    """A merge whose choices do not go together."""

    def prepare() -> list[str]:
        stored_brick("kept")
        stored_brick("also")
        return ["bricks=[kept,also]", "name=m", "tracking=disabled", *choices]

    return prepare


def library_is_a_file() -> list[str]:
    """A library where a file stands."""
    Path("shelf").write_text("")
    return [*OWN, "library=shelf"]


CASES: dict[str, tuple[Callable[[], list[str]] | list[str], str]] = {
    "unknown key": ([*OWN, "brick.rnk=8"], "brick.rank"),
    "key of another operation": ([*OWN, "weights=[1.0,2.0]"], "merge"),
    "unknown recipe": (["recipe=task/clasify"], "task/classify"),
    "wrong type": ([*OWN, "trainer.epochs=many"], "trainer.epochs"),
    "out of range": ([*OWN, "brick.rank=0"], "brick.rank"),
    "missing file": ([*CLASSIFY, "data.train=b.jsonl"], "b.jsonl"),
    "empty data": (spoil_data(""), "a.jsonl"),
    "wrong column": ([*OWN, "data.text=txt"], "text"),
    "label not in the list": ([*OWN, "data.labels=[yes,maybe]"], "a.jsonl:1"),
    "broken row": (spoil_data(lines({"text": "w3", "label": "yes"}, '{"text": ')), "a.jsonl:2"),
    "empty text": (spoil_data(lines({"text": "", "label": "yes"})), "a.jsonl:1"),
    "name that climbs out": ([*OWN, "name=../out"], "name"),
    "library that is a file": (library_is_a_file, "shelf"),
    "no such backbone, no network": (
        [*OWN, "backbone=hf", "backbone.path=nobody/nothing"],
        "nobody/nothing",
    ),
    "truncated backbone": (backbone_of(truncated), "model.safetensors"),
    "backbone as a pickle": (backbone_of(pickled), "safetensors"),
    "pinned hash differs": ([*OWN, f"backbone.sha256={'0' * 64}"], "sha256"),
    "brick that is not there": ([*EVALUATE, "bricks=[nobody]"], "nobody"),
    "truncated brick": (
        brick_with(lambda p: p.write_bytes(p.read_bytes()[:-8]) and None),
        "adapter_model.safetensors",
    ),
    "brick with a NaN": (brick_with(with_nan), "adapter_model.safetensors"),
    "brick of another backbone": (other_backbone, "kept"),
    "too few weights": (one_weight, "weights"),
    "rule in a space": (merge_that_is_none("recipe=merge/ties", "merge.space=cat"), "cat"),
    "cut of a sum": (
        merge_that_is_none("recipe=merge/linear", "merge.space=cat", "merge.rank=2"),
        "merge.rank",
    ),
    "filter of nothing": (
        merge_that_is_none("recipe=merge/linear", "merge.filters=[[atn.*,1,2]]"),
        "atn.*",
    ),
    "filters without weights": (
        merge_that_is_none("recipe=merge/magmax", "merge.filters=[[attn.*,1,2]]"),
        "merge.filters",
    ),
    "broken expression": ([*EVALUATE, "bricks=[merge(linear, [a)]"], "merge"),
    "unknown task": (["recipe=task/multitask", "data.tasks=[quick_ton]"], "quick_tone"),
    "site that does not exist": ([*OWN, "brick.sites=[attn.w]"], "attn.w"),
    "online without a key": ([*OWN, "tracking.mode=online"], "WANDB_API_KEY"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_exit_code_2_nothing_changed(
    case: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sentence names the culprit, or the nearest right name."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    prepared, named = CASES[case]
    arguments = prepared if isinstance(prepared, list) else prepared()
    before = snapshot(here)
    capsys.readouterr()
    code = main(arguments)
    err = capsys.readouterr().err
    assert code == 2, err
    sentences = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1 and named in sentences[0], err
    assert "Traceback" not in err
    assert snapshot(here) == before


def test_disk_full(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too little room is seen before anything is made."""
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    before = snapshot(here)
    assert main(OWN) == 2
    assert "full" in capsys.readouterr().err
    assert snapshot(here) == before


def test_read_only_library(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A library that may not be written is refused before the training, not after it."""
    import os

    Path("shelf").mkdir()
    allowed = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode, **k: "shelf" not in str(path) and allowed(path, mode, **k)
    )
    before = snapshot(here)
    assert main([*OWN, "library=shelf"]) == 2
    assert "shelf" in capsys.readouterr().err
    assert snapshot(here) == before


def test_a_pickle_as_an_adapter(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`library add` reads safetensors only."""
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    Path("adapter/adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))
    before = snapshot(here)
    assert library_main(["add", "adapter", "--name", "bad"]) == 2
    assert "safetensors" in capsys.readouterr().err
    assert snapshot(here) == before


def test_writing_over_the_input(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers never replace the questions."""
    stored_brick()
    before = snapshot(here)
    assert main(["recipe=predict", "bricks=[kept]", "data.input=a.jsonl", "out=a.jsonl"]) == 2
    assert main(["recipe=predict", "bricks=[kept]", "data.input=a.jsonl", "out=a.xlsx"]) == 2
    assert "end it in one of .jsonl, .csv, .parquet" in capsys.readouterr().err
    assert snapshot(here) == before
