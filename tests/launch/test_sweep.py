"""Many runs from one command: all are checked, the missing ones run, a list of records ends it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cfm_train import paths
from cfm_train.launch.sweep import typed
from tests.launch.conftest import Command


def records(tmp_path: Path) -> dict[str, int]:
    found = tmp_path.glob("outputs/runs/*/*/record.json")
    return {str(path): path.stat().st_mtime_ns for path in found}


def test_a_sweep_runs_what_is_missing(command: Command, tmp_path: Path) -> None:
    first = command("-m", "seed=1,2")
    assert first.code == 0, first.err
    assert "[1/2] seed=1\n" in first.out
    assert "[2/2] seed=2\n" in first.out
    listed = first.record
    assert (listed["operation"], listed["status"]) == ("sweep", "done")
    assert [run["overrides"][-1] for run in listed["runs"]] == ["seed=1", "seed=2"]
    assert {run["record"] for run in listed["runs"]} == set(records(tmp_path))
    assert first.folder.parent == tmp_path / "outputs/sweeps"
    for run in listed["runs"]:
        one = json.loads(Path(run["record"]).read_text())
        assert (run["status"], one["status"]) == ("done", "done")
        config = (Path(run["record"]).parent / "config.yaml").read_text()
        assert f"group: {first.folder.name}" in config  # the runs stand together in W&B

    before = records(tmp_path)
    more = command("-m", "seed=3,1,2")
    assert more.code == 0
    assert "[2/3] seed=1 (finished before)\n" in more.out
    assert len(records(tmp_path)) == 3
    assert before.items() <= records(tmp_path).items()  # not one of them was written again

    alone = command("seed=2")  # a run of the sweep is an ordinary run
    assert "finished before" in alone.out


def test_a_run_that_fails_does_not_stop_the_others(command: Command) -> None:
    ended = command("-m", "trainer.learning_rate=1e30,1e-3", "trainer.max_steps=8")
    assert ended.code == 1
    assert ended.err.splitlines()[-1] == "error: 1 of 2 runs failed"
    runs = ended.record["runs"]
    assert [run["status"] for run in runs] == ["failed", "done"]
    assert runs[0]["error"]
    assert runs[1]["error"] is None
    assert ended.folder.is_dir()


def test_one_wrong_run_stops_all_before_they_start(command: Command, tmp_path: Path) -> None:
    ended = command("-m", "seed=1,2", "brick.rank=4,0.5")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == (
        "error: seed=1 brick.rank=0.5: brick.rank=0.5 does not fit: it must be a whole number.\n"
    )
    ended = command("-m", "data.text=absent,text")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: data.text=absent: ")
    assert not list(tmp_path.iterdir())


def test_a_dry_sweep_makes_nothing(command: Command, tmp_path: Path) -> None:
    ended = command("-m", "seed=1,2,2", "dry_run=true")
    assert ended.code == 0
    assert ended.out.splitlines()[-1] == "dry run: every check passed for 2 runs"
    assert not list(tmp_path.iterdir())


def test_a_launcher_of_hydra_runs_them(command: Command, tmp_path: Path) -> None:
    ended = command("hydra/launcher=basic", "-m", "seed=1,2", "name=1e5,b")
    assert ended.code == 0, ended.err
    runs = ended.record["runs"]
    assert [run["status"] for run in runs] == ["done"] * 4
    names = [json.loads(Path(run["record"]).read_text())["name"] for run in runs]
    assert names == ["1e5", "b"] * 2
    assert len(records(tmp_path)) == 4
    configs = tmp_path.glob("outputs/runs/*/*/config.yaml")
    assert all(f"group: {ended.folder.name}" in path.read_text() for path in configs)


@pytest.mark.slow
def test_submitit_runs_them_in_processes_of_their_own(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit", reason="needs hydra-submitit-launcher")
    monkeypatch.setenv("PYTHONPATH", str(paths.PACKAGE.parent))
    engine = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"]
    ended = command("-m", *engine, "seed=1,2", "brick.sites=[attn.v]")
    assert ended.code == 0, ended.err
    assert [run["status"] for run in ended.record["runs"]] == ["done", "done"]
    assert len(records(tmp_path)) == 2
    before = records(tmp_path)
    again = command("-m", *engine, "seed=1,2", "brick.sites=[attn.v]")
    assert (again.code, records(tmp_path)) == (0, before)


def test_a_launcher_that_is_not_there(command: Command, tmp_path: Path) -> None:
    ended = command("-m", "hydra/launcher=rai", "seed=1,2")
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "hydra/launcher" in ended.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("prepared", "meant"),
    [
        (["++seed=1", "recipe=a/b"], ["seed=1", "recipe=a/b"]),
        (["++name=cfmtext_612c2062_", "hydra.verbose=true"], ["name=a, b"]),
    ],
)
def test_overrides_as_a_person_types_them(prepared: list[str], meant: list[str]) -> None:
    assert typed(prepared) == meant
