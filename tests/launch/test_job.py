"""One run from its command to its record: finished, found again, refused, failed, interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from cfm_train import paths
from cfm_train.config.compose import compose
from cfm_train.config.validate import validate
from cfm_train.launch import clock, job
from cfm_train.launch.clock import Clock
from tests.launch.conftest import SHORT, Command

#: A run whose clock beats often.
KILLED = """
import sys
from cfm_train.launch import clock
from cfm_train.launch.cli import main
clock.BEAT = 0.05
main(sys.argv[1:])
"""


def below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_run_and_the_same_command_again(command: Command, tmp_path: Path) -> None:
    first = command("name=1e5", "seed=3")
    assert first.code == 0, first.err
    record, folder = first.record, first.folder
    assert folder.name == f"1e5-{record['config_hash'][:10]}"
    assert folder.parent == tmp_path / "outputs/runs/task-quick_tone"
    assert (record["status"], record["operation"], record["seed"]) == ("done", "train", 3)
    assert (record["recipe"], record["name"]) == ("task/quick_tone", "1e5")
    assert record["cost"]["seconds"] > 0
    assert record["seedless_hash"] != record["config_hash"]
    other = command("name=1e5", "seed=4").record
    assert other["seedless_hash"] == record["seedless_hash"]
    assert other["config_hash"] != record["config_hash"]
    assert record["versions"]["torch"]
    assert set(record["inputs"]) >= {"backbone"}
    assert yaml.safe_load((folder / "config.yaml").read_text()) == validate(
        compose([*SHORT, "name=1e5", "seed=3"])
    )

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = command("name=1e5", "seed=3")
    assert again.code == 0
    assert again.folder == folder
    assert "This run was finished before" in again.out
    assert all(key in again.out for key in record["metrics"])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_time_of_a_run_is_that_of_all_its_sessions(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed session counts up to its last beat; a new start from nothing begins at zero."""
    monkeypatch.setattr(clock, "BEAT", 0.05)
    killed = [sys.executable, "-c", KILLED, *SHORT, "trainer.max_steps=100000"]
    env = {**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent)}
    process = subprocess.Popen(killed, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("outputs/runs/*/*/checkpoints/last.ckpt")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    process.kill()
    process.wait()
    (folder,) = tmp_path.glob("outputs/runs/*/*")
    first = json.loads((folder / "seconds.json").read_text())["seconds"]
    assert first > 0.5

    with Clock(folder, goes_on=True) as again:
        time.sleep(0.2)
        total = again.seconds()
    assert first + 0.2 <= total < first + 5
    assert first + 0.2 <= json.loads((folder / "seconds.json").read_text())["seconds"]
    (folder / "seconds.json").write_text("{")
    assert Clock(folder, goes_on=True).seconds() < 1
    assert Clock(folder, goes_on=False).seconds() < 1

    (folder / "seconds.json").write_text('{"seconds": 1000.0}')
    monkeypatch.setattr(job, "_begun", lambda folder: True)
    resumed = command("seed=2")
    assert resumed.record["cost"]["seconds"] < 1000, "another run, another clock"
    (resumed.folder / "record.json").unlink()
    (resumed.folder / "seconds.json").write_text('{"seconds": 1000.0}')
    assert 1000 < command("seed=2").record["cost"]["seconds"] < 1120


def test_a_record_that_cannot_be_read_is_written_anew(command: Command) -> None:
    first = command("seed=1")
    metrics = first.record["metrics"]
    (first.folder / "record.json").write_text("{")
    again = command("seed=1")
    assert (again.code, again.record["status"]) == (0, "done")
    assert again.record["metrics"] == metrics


def test_the_same_run_never_goes_twice_at_once(command: Command, tmp_path: Path) -> None:
    dry = command("dry_run=true")
    assert dry.code == 0
    folder = Path(dry.out.strip().rsplit(" ", 1)[-1])
    assert not list(tmp_path.iterdir())
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        refused = command()
    assert refused.code == 2
    assert refused.err == (
        f"error: This run is already going in another process ({folder}): wait for it, or change "
        "name= or seed=.\n"
    )


def test_what_only_the_model_can_refuse_leaves_no_folder(command: Command, tmp_path: Path) -> None:
    refused = command("brick.sites=[attn.nope]")
    assert refused.code == 2
    assert refused.err.startswith("error: ")
    assert "attn.nope" in refused.err
    assert not (tmp_path / "outputs/runs").exists()


def test_a_run_that_breaks_off_leaves_a_record_and_a_log(command: Command) -> None:
    failed = command("trainer.learning_rate=1e30", "trainer.warmup=0.0", "trainer.max_steps=8")
    assert failed.code == 1
    record = failed.record
    assert record["status"] == "failed"
    assert record["error"]
    assert failed.err.splitlines()[-1].startswith("error: ")
    assert record["error"] in failed.err
    assert str(failed.folder / "log.txt") in failed.err
    assert "Traceback" in (failed.folder / "log.txt").read_text()


def test_a_full_disk_is_seen_before_anything_is_made(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "FREE_BYTES", 2**80)  # no disk has as much
    refused = command()
    assert refused.code == 2
    assert refused.err.startswith(f"error: outputs: the disk of {tmp_path} is full (")
    assert refused.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_outputs_that_is_a_file(command: Command, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    refused = command("outputs=taken")
    assert refused.code == 2
    assert refused.err == (
        f"error: outputs: cannot write into {tmp_path / 'taken'}; choose another folder with "
        "outputs=DIR.\n"
    )
    assert below(tmp_path) == ["taken"]


@pytest.mark.parametrize("moment", ["config.yaml", "metrics.jsonl"])
def test_control_c_ends_with_130_and_the_run_goes_on_later(moment: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cfm_train", *SHORT, "trainer.max_steps=100000"]
    env = {**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent)}
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=env,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Started in the background, the tests ignore Ctrl-C, and their children would too.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(f"outputs/runs/*/*/{moment}")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted: the same command takes the run up again."
    assert not list(tmp_path.rglob("record.json"))
