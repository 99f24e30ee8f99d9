"""Real W&B runs, offline, read back with the wandb package's own `leet inspect`."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from cfm_train.errors import UserError
from cfm_train.tracking.metrics_file import MetricsFile
from cfm_train.tracking.wandb_run import WandbRun
from cfm_train.tracking.wandb_setting import resolve_mode

ROOT = Path(__file__).resolve().parents[2]

# A training loop as the trainer runs it: cut back to the checkpoint, a row on disk, then to W&B.
LOOP = """
    import os, sys
    from pathlib import Path
    from cfm_train.tracking.metrics_file import MetricsFile
    from cfm_train.tracking.wandb_run import WandbRun

    folder, checkpoint, last, kill_at = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    file = MetricsFile(folder / "metrics.jsonl")
    file.cut_back(checkpoint)
    run = WandbRun("offline", "p", "g", "train", ["t"], {"brick": {"rank": 8}}, folder)
    for step in range(checkpoint + 1, last + 1):
        rows = [{"train/loss": 1 / step}]
        if step % 10 == 0:
            rows.append({"validation/accuracy": step / 1000})
        for row in rows:
            file.append(step, row)
            run.log(step, row)
        if step == kill_at:
            os.kill(os.getpid(), 9)
    run.finish(0)
"""


def python(code: str, *arguments: object, home: Path, check: bool = True):
    """Runs code in a process of its own, with an empty home and no W&B settings."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT), "TMPDIR": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr
    return done


def inspect(folder: Path) -> list[dict]:
    """All records of all offline folders of a run, in order."""
    records = []
    for log in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
        out = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        records += [json.loads(line) for line in out.stdout.splitlines()]
    return records


def history(records: list[dict]) -> Counter:
    """How often each (step, key, value) was logged."""
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    return Counter(
        (row["_step"], key, value)
        for row in rows
        for key, value in row.items()
        if key.startswith(("train/", "validation/", "test/"))
    )


def in_metrics_file(folder: Path) -> Counter:
    rows = MetricsFile(folder / "metrics.jsonl").rows()
    return Counter((r["step"], key, r[key]) for r in rows for key in r if key != "step")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_everything_arrives_quietly_and_stays_in_the_run_folder(folder: Path, home: Path) -> None:
    brick = folder.parent / "brick"
    brick.mkdir()
    (brick / "brick.json").write_text('{"format": 1}')
    done = python(
        """
        import sys
        from cfm_train.tracking.wandb_run import WandbRun

        run = WandbRun("auto", "bricks", "sweep 1", "merge", ["a", "b"], {"rule": {"density": 0.2}},
                       sys.argv[1])
        run.log(1, {"train/loss": 0.5, "note": "x"})
        run.log(2, {"train/loss": 0.25})
        run.table("samples", ["input", "prediction"], [["a film", "good"], ["a bore", "bad"]])
        run.artifact("mine", "brick", sys.argv[2], {"version": "1f2c"})
        run.summary({"test/accuracy": 0.75})
        run.finish(3)
        assert run.error is None, run.error
        print(run.as_record())
        """,
        folder,
        brick,
        home=home,
    )
    run_id = (folder / "wandb" / "run_id").read_text()
    facts = {"mode": "offline", "id": run_id, "project": "bricks", "group": "sweep 1"}
    assert done.stdout == f"{facts}\n"
    assert done.stderr == ""
    records = inspect(folder)
    by_type = {record["type"]: record[record["type"]] for record in records}
    run = by_type["run"]
    assert (run["run_id"], run["project"], run["run_group"]) == (run_id, "bricks", "sweep 1")
    assert (run["job_type"], run["tags"], run["display_name"]) == ("merge", ["a", "b"], "run")
    assert run["config"]["update"]["rule"] == {"density": 0.2}
    assert history(records) == {(1, "train/loss", 0.5): 1, (2, "train/loss", 0.25): 1}
    assert by_type["exit"]["exit_code"] == 3
    updates = [r["summary"]["update"] for r in records if r["type"] == "summary"]
    assert {"test/accuracy": 0.75} in updates
    artifact = next(r["artifact"] for r in records if r.get("artifact", {}).get("type") == "brick")
    assert artifact["name"] == "mine" and json.loads(artifact["metadata"]) == {"version": "1f2c"}
    (entry,) = artifact["manifest"]["contents"]
    md5 = hashlib.md5(b'{"format": 1}').digest()
    assert (entry["path"], entry["digest"]) == ("brick.json", base64.b64encode(md5).decode())
    assert Path(entry["local_path"]).is_relative_to(folder)
    table = json.loads(next(folder.rglob("files/media/table/*.json")).read_text())
    assert table["data"] == [["a film", "good"], ["a bore", "bad"]]
    assert not list(home.iterdir()), "W&B wrote outside the run folder"


@pytest.mark.slow
def test_rows_lost_in_a_sigkill_are_replayed_and_none_comes_twice(folder: Path, home: Path) -> None:
    killed = python(LOOP, folder, 0, 100, 57, home=home, check=False)
    assert killed.returncode == -9
    first_id = (folder / "wandb" / "run_id").read_text()
    lost = in_metrics_file(folder) - history(inspect(folder))
    assert lost, "W&B wrote every row before the kill: the test shows nothing"
    assert python(LOOP, folder, 40, 100, 72, home=home, check=False).returncode == -9
    python(LOOP, folder, 70, 100, 0, home=home)
    records = inspect(folder)
    assert history(records) == in_metrics_file(folder)
    assert len(in_metrics_file(folder)) == 110
    ids = {r["run"]["run_id"] for r in records if r["type"] == "run"}
    assert ids == {first_id} == {(folder / "wandb" / "run_id").read_text()}


@pytest.mark.slow
def test_a_killed_run_is_taken_up_by_the_process_that_started_it(folder: Path, home: Path) -> None:
    """A notebook or a sweep with a W&B run of its own: its service outlives the run it started."""
    parent = """
        import os, subprocess, sys
        from pathlib import Path
        from cfm_train.tracking.wandb_run import WandbRun

        loop, folder = sys.argv[1:]
        own = Path(folder).with_name("own")
        own.mkdir()
        run = WandbRun("offline", "p", "g", "train", [], {}, own)
        assert os.environ["WANDB_SERVICE"]
        for checkpoint, kill_at in ("0", "57"), ("40", "0"):
            command = [sys.executable, "-c", loop, folder, checkpoint, "100", kill_at]
            print(subprocess.run(command).returncode)
        run.log(1, {"train/loss": 1.0})
        run.finish(0)
        assert run.error is None
    """
    done = python(parent, textwrap.dedent(LOOP), folder, home=home)
    assert done.stdout.split() == ["-9", "0"] and "W&B could not" not in done.stderr
    assert history(inspect(folder)) == in_metrics_file(folder)
    assert history(inspect(folder.with_name("own"))) == Counter({(1, "train/loss", 1.0): 1})


@pytest.mark.slow
def test_steps_run_again_after_they_reached_wandb_are_not_logged_twice(
    folder: Path, home: Path
) -> None:
    python(LOOP, folder, 0, 35, 0, home=home)  # stopped cleanly at 35; the checkpoint stands at 20
    python(LOOP, folder, 20, 50, 0, home=home)
    logged = history(inspect(folder))
    assert logged == in_metrics_file(folder)
    assert set(logged.values()) == {1}


def test_two_runs_in_one_process_stay_apart(folder: Path, home: Path) -> None:
    one, two = folder / "one", folder / "two"
    one.mkdir(), two.mkdir()
    python(
        """
        import sys
        from cfm_train.tracking.wandb_run import WandbRun

        one, two = (WandbRun("offline", "p", None, "train", [], {"n": n}, f"{sys.argv[1]}/{n}")
                    for n in ("one", "two"))
        for step in (1, 2, 3):
            one.log(step, {"train/loss": 1.0 * step})
            two.log(step, {"train/loss": 10.0 * step})
        one.finish(0)
        two.log(4, {"train/loss": 40.0})
        two.finish(1)
        assert one.error is two.error is None
        """,
        folder,
        home=home,
    )
    both = inspect(one), inspect(two)
    assert sorted(history(both[0])) == [(s, "train/loss", 1.0 * s) for s in (1, 2, 3)]
    assert sorted(history(both[1])) == [(s, "train/loss", 10.0 * s) for s in (1, 2, 3, 4)]
    exits = [[r["exit"] for r in records if r["type"] == "exit"] for records in both]
    assert [exit_record.get("exit_code", 0) for (exit_record,) in exits] == [0, 1]


def test_disabled_imports_nothing_and_writes_nothing(folder: Path, home: Path) -> None:
    done = python(
        """
        import sys
        from cfm_train.tracking.wandb_run import WandbRun

        run = WandbRun("disabled", "p", None, "train", [], {}, sys.argv[1])
        run.log(1, {"train/loss": 1.0})
        run.table("t", ["a"], [[1]])
        run.artifact("a", "brick", ".", {})
        run.summary({"x": 1})
        run.finish(0)
        heavy = {"wandb", "torch", "transformers", "lightning"} & set(sys.modules)
        print(heavy or "light", run.as_record()["id"])
        """,
        folder,
        home=home,
    )
    assert done.stdout == "light None\n"
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_when_wandb_dies_training_goes_on_and_a_resume_makes_up_for_it(
    folder: Path, home: Path
) -> None:
    done = python(
        """
        import os, signal, sys, time
        from pathlib import Path
        from cfm_train.tracking.metrics_file import MetricsFile
        from cfm_train.tracking.wandb_run import WandbRun

        folder = Path(sys.argv[1])
        file = MetricsFile(folder / "metrics.jsonl")
        run = WandbRun("offline", "p", None, "train", [], {}, folder)
        for step in range(1, 41):
            file.append(step, {"train/loss": 1 / step})
            run.log(step, {"train/loss": 1 / step})
            if step == 20:  # the service that W&B runs beside us dies
                for stat in Path("/proc").glob("[0-9]*/stat"):
                    if stat.read_text().rsplit(")", 1)[1].split()[1] == str(os.getpid()):
                        os.kill(int(stat.parent.name), signal.SIGKILL)
                time.sleep(0.5)
        run.finish(0)
        print(run.as_record()["error"])
        """,
        folder,
        home=home,
    )
    assert done.stdout.startswith("could not log: ")
    assert "Training goes on" in done.stderr
    python(LOOP, folder, 40, 45, 0, home=home)
    assert history(inspect(folder)) == in_metrics_file(folder)
    assert len(in_metrics_file(folder)) == 45


def test_an_artifact_that_cannot_be_logged_costs_only_itself(folder: Path, home: Path) -> None:
    done = python(
        """
        import sys
        from cfm_train.tracking.wandb_run import WandbRun

        run = WandbRun("offline", "p", None, "train", [], {}, sys.argv[1])
        run.log(1, {"train/loss": 1.0})
        run.artifact("mine", "brick", "/nowhere/at/all", {})
        run.log(2, {"train/loss": 0.5})
        run.finish(0)
        print(run.as_record()["error"])
        """,
        folder,
        home=home,
    )
    assert done.stdout.startswith("could not log the artifact mine: ")
    assert len(history(inspect(folder))) == 2


def test_online_without_a_server_becomes_offline(folder: Path, home: Path) -> None:
    done = python(
        """
        import os, sys
        os.environ["WANDB_API_KEY"] = "0" * 40
        os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:9"  # nothing listens there
        os.environ["WANDB_INIT_TIMEOUT"] = "3"
        from cfm_train.tracking.wandb_run import WandbRun

        run = WandbRun("auto", "p", None, "train", [], {}, sys.argv[1])
        run.log(1, {"train/loss": 1.0})
        run.finish(0)
        print(run.mode, run.error)
        """,
        folder,
        home=home,
    )
    assert done.stdout == "offline None\n"
    assert "this run is logged offline" in done.stderr
    assert history(inspect(folder)) == {(1, "train/loss", 1.0): 1}


def test_steps_go_forward_only(folder: Path) -> None:
    run = WandbRun("disabled", "p", None, "train", [], {}, folder)
    run.log(5, {"a": 1})
    run.log(5, {"b": 1})
    with pytest.raises(ValueError, match="step 4 comes after step 5"):
        run.log(4, {"a": 1})


def test_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert [resolve_mode(m) for m in ("auto", "offline", "disabled")] == [
        "offline",
        "offline",
        "disabled",
    ]
    with pytest.raises(UserError, match="online needs WANDB_API_KEY"):
        resolve_mode("online")
    with pytest.raises(UserError, match="Did you mean 'offline'"):
        resolve_mode("ofline")
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert [resolve_mode(m) for m in ("auto", "offline", "online")] == [
        "online",
        "offline",
        "online",
    ]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "disabled"
    monkeypatch.setenv("WANDB_MODE", "shared")
    with pytest.raises(UserError, match="WANDB_MODE"):
        resolve_mode("auto")
