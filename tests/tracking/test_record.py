"""Records: strict, stable, atomic."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from demo_records import quickstart

from cfm_train.errors import UserError
from cfm_train.tracking.record import new_record, read_record, validate, write_record

ROOT = Path(__file__).resolve().parents[2]
BARE = {"operation": "train", "recipe": "task/sst2", "name": "sst2", "seed": 0, "config_hash": "ab"}


def test_a_bare_record_has_every_key_that_others_rely_on() -> None:
    record = new_record(**BARE)
    assert set(record) == {
        "operation", "recipe", "name", "status", "seed", "brick", "backbone", "metrics", "checks",
        "cost", "config_hash", "versions", "inputs", "data", "matrix", "samples", "wandb", "curves",
    }  # fmt: skip
    assert set(record["cost"]) == {
        "seconds", "train_seconds", "samples_per_second", "tokens_per_second",
        "peak_memory_bytes", "trainable_parameters", "flop_share",
    }  # fmt: skip
    assert record["status"] == "done"


def test_what_is_written_is_read_and_the_folder_can_be_moved(tmp_path: Path) -> None:
    for record in quickstart(tmp_path / "a"):
        folder = Path(record["folder"])
        raw = json.loads((folder / "record.json").read_text())
        assert "folder" not in raw
        assert {**raw, "folder": record["folder"]} == record
    folder = tmp_path / "run"
    folder.mkdir()
    record = new_record(**BARE, curves=str(folder / "metrics.jsonl"))
    write_record(record, folder / "record.json")
    folder.rename(tmp_path / "moved")
    moved = read_record(tmp_path / "moved")
    assert (moved["curves"], moved["folder"]) == ("metrics.jsonl", str(tmp_path / "moved"))
    assert str(tmp_path) not in (tmp_path / "moved" / "record.json").read_text()


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (("seed",), "0", "seed: "),
        (("seed",), True, "seed: "),
        (("sed",), 1, "sed: extra"),
        (("status",), "finished", "status: "),
        (("cost", "seconds"), float("nan"), "cost.seconds: "),
        (("cost", "hours"), 1.0, "cost.hours: extra"),
        (("backbone", "unchanged"), None, "backbone.unchanged: "),
        (("metrics", "test/accuracy", "low"), 0.95, "does not hold the value"),
        (("metrics", "test/accuracy", "high"), float("inf"), "metrics.test/accuracy.high: "),
        (("matrix", 0, "role"), "bound", "matrix.0.role: "),
        (("matrix", 0, "value"), 0.99, "matrix.0: the interval"),
        (("checks", "backbone unchanged", "passed"), "yes", "checks.backbone unchanged.passed: "),
        (("samples", 0, "input"), 5, "samples.0.input: "),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, place: tuple, value: object, sentence: str) -> None:
    record = copy.deepcopy(quickstart(tmp_path)[0])
    at: object = record
    for key in place[:-1]:
        at = at[key]  # type: ignore[index]
    at[place[-1]] = value  # type: ignore[index]
    with pytest.raises(ValueError, match=sentence.replace(".", r"\.")):
        validate(record)
    target = tmp_path / "new.json"
    with pytest.raises(ValueError):
        write_record(record, target)
    assert not target.exists()


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    record = dict(new_record(**BARE))
    del record["metrics"]
    with pytest.raises(ValueError, match="metrics: field required"):
        validate(record)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot read the record"),
        ("{", "not a JSON record"),
        ("[]", "not a record but a JSON list"),
        ('{"operation": NaN}', "not a JSON record"),
        ('{"operation": "train"}', "not a valid record: recipe"),
        ("\udc80", "not a JSON record"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "record.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=sentence) as caught:
        read_record(tmp_path)
    assert "record.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_kill_leaves_the_old_record_or_the_new_one(tmp_path: Path) -> None:
    script = """
import sys
from cfm_train.tracking.record import new_record, write_record
samples = [{"input": "x" * 1000, "prediction": "", "reference": ""}] * 2000
for seed in range(10**6):
    write_record(new_record(operation="train", recipe="r", name="n", seed=seed,
                            config_hash="ab", samples=samples), sys.argv[1])
"""
    path = tmp_path / "record.json"
    for delay in (0.0, 0.013, 0.031):
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        while not path.exists():
            time.sleep(0.01)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert len(read_record(path)["samples"]) == 2000
        path.unlink()


def test_a_full_disk_leaves_the_old_record(tmp_path: Path) -> None:
    script = """
import resource, sys
from cfm_train.tracking.record import new_record, write_record
bare = dict(operation="train", recipe="r", name="n", seed=0, config_hash="ab")
write_record(new_record(**bare), sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # the file system takes no more bytes
long = [{"input": "x" * 9000, "prediction": "", "reference": ""}]
try:
    write_record(new_record(**bare, samples=long), sys.argv[1])
except OSError as error:
    print(error.strerror)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "record.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "File too large\n"
    assert read_record(tmp_path)["samples"] == []
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_reading_records_imports_nothing_heavy() -> None:
    script = (
        "import sys, cfm_train.tracking.record, cfm_train.tracking.dashboard; print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert not {"torch", "transformers", "wandb", "pytorch_lightning"} & set(done.stdout.split())
