"""A search that is killed goes on after its last trial, and comes to what it would have come to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cfm_train import paths
from cfm_train.config.searching import methods
from cfm_train.launch.cli import main
from cfm_train.operations.bench import Bench, Tried
from cfm_train.operations.found import Found, find
from cfm_train.operations.trials import read
from cfm_train.tracking.metrics_file import MetricsFile
from cfm_train.tracking.wandb_run import WandbRun
from tests.backbones import folder as backbone_folder
from tests.merging.benches import bench_of
from tests.tasks import section as data_section

SHORT: dict[str, dict[str, Any]] = {
    "grid": {"weights": [0.5, 1.0], "space": {"density": [0.3, 0.6]}},
    "bayes": {"trials": 8, "initial": 3},
    "gradient": {"steps": 14, "every": 2, "learning_rate": 0.05},
    "adamerging": {"steps": 14, "every": 2, "learning_rate": 0.05},
    "lorahub": {"trials": 8},
    "cma_es": {"trials": 8},
}
RULES = {"grid": "ties/mergekit"}
#: LoraHub begins at weights of zero, which are no average: such a trial is kept like any other.
MERGES = {"lorahub": {"normalize": True}}


class Killed(BaseException):
    """Stands for a SIGKILL."""


def searched(kind: str, data: Path, run: Path) -> Found:
    """One start of a search in a run folder."""
    bench = bench_of(
        data, kind, RULES.get(kind, "linear"), merge=MERGES.get(kind, {}), **SHORT[kind]
    )
    off = WandbRun("disabled", "p", None, "merge", [], {}, run)
    return find(bench, off, run, goes_on=True)


@contextmanager
def asked(most: int | None = None) -> Iterator[list[Sequence[float]]]:
    """The points that are tried in the block; killed within the trial after so many."""
    points: list[Sequence[float]] = []
    try_out = Bench.try_out

    def counted(bench: Bench, point: Sequence[float]) -> Tried:
        if len(points) == most:
            raise Killed
        points.append(list(point))
        return try_out(bench, point)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bench, "try_out", counted)
        yield points


def same(found: Found, expected: Found, at: Path, whole: Path) -> None:
    assert found.entry == expected.entry
    assert (found.weights, found.section) == (expected.weights, expected.section)
    for name in ("trials.jsonl", "metrics.jsonl"):
        assert (at / name).read_bytes() == (whole / name).read_bytes()


def test_every_search_is_killed_here() -> None:
    assert set(SHORT) == set(methods())


@pytest.mark.parametrize("kind", SHORT)
def test_a_broken_search_ends_as_the_unbroken_one(kind: str, tmp_path: Path) -> None:
    """Killed after one trial and after three more: nothing is tried twice."""
    data, whole, broken = (tmp_path / name for name in ("data", "whole", "broken"))
    for folder in (data, whole, broken):
        folder.mkdir()
    with asked() as points:
        expected = searched(kind, data, whole)
    assert len(points) == 8
    if kind == "lorahub":
        assert '"cost": Infinity' in (whole / "trials.jsonl").read_text().splitlines()[0]
    done: list[Sequence[float]] = []
    for most in (1, 3):
        with pytest.raises(Killed), asked(most) as tried:
            searched(kind, data, broken)
        done += tried
        for path in broken.glob("*.jsonl"):  # the next line was torn
            with path.open("a") as file:
                file.write('{"step": 1, "point": [0.')
    assert len(read(broken / "trials.jsonl")) == len(done) == 4
    with asked() as tried:
        found = searched(kind, data, broken)
    assert done + tried == points
    same(found, expected, broken, whole)
    with asked() as tried:
        again = searched(kind, data, broken)
    assert not tried
    same(again, expected, broken, whole)


@pytest.mark.parametrize("damage", ["another point", "no trial", "fewer than metrics"])
def test_what_does_not_fit_is_tried_anew(damage: str, tmp_path: Path) -> None:
    """A kept trial of another point, by one bit, ends what is taken from the file."""
    data, whole = tmp_path / "data", tmp_path / "whole"
    data.mkdir()
    whole.mkdir()
    with asked() as points:
        expected = searched("cma_es", data, whole)
    before = {path: path.read_bytes() for path in whole.glob("*.jsonl")}
    lines = (whole / "trials.jsonl").read_text().splitlines()
    if damage == "another point":
        trial = json.loads(lines[2])
        trial["point"][0] *= 1 + 2**-52
        lines[2] = json.dumps(trial)
    elif damage == "no trial":
        lines[2] = "null"
    else:
        lines = lines[:2]
    (whole / "trials.jsonl").write_text("\n".join(lines) + "\n")
    (whole / "metrics.jsonl").write_text('{"step": 1, "search/loss": 9.0}\n')
    with asked() as tried:
        found = searched("cma_es", data, whole)
    assert tried == points[2:]
    same(found, expected, whole, whole)
    assert {path: path.read_bytes() for path in whole.glob("*.jsonl")} == before


def test_another_search_in_the_folder_starts_afresh(tmp_path: Path) -> None:
    """Unless it is said that it goes on, trials of before are no business of a search."""
    with asked() as points:
        for _ in range(2):
            bench = bench_of(tmp_path, "lorahub", trials=2)
            find(bench, WandbRun("disabled", "p", None, "merge", [], {}, tmp_path), tmp_path)
    assert len(points) == 4


# ---------------------------------------------------------------- real processes

#: The command, killed within the trial of a number, or when all is tried and the merge is judged.
KILLED = """
import os, signal, sys
from cfm_train.launch.cli import main
from cfm_train.operations import found
from cfm_train.operations.bench import Bench

moment, tried, try_out = sys.argv[1], [], Bench.try_out

def killed(*given, **more):
    os.kill(os.getpid(), signal.SIGKILL)

def counted(bench, point):
    tried.append(point)
    return killed() if str(len(tried)) == moment else try_out(bench, point)

Bench.try_out = counted
if moment == "report":
    found.report = killed
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_sigkill_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record, the brick and the curve are the unbroken run's, and W&B has each row once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for seed, name in enumerate("ab"):
        data = data_section("classification", tmp_path, seed=seed, rows=48, name=name)
        files = [f"data.{split}={data[split]}" for split in ("train", "validation", "test")]
        arguments = [
            "recipe=task/classify", f"name={name}", f"seed={seed}", "backbone=hf",
            f"backbone.path={backbone_folder('bert')}", *files, "trainer.max_steps=3",
            "trainer.samples=0", "evaluation.bootstrap=20", "tracking=disabled",
        ]  # fmt: skip
        assert main(arguments) == 0, capsys.readouterr().err
    search = [
        "recipe=merge/linear", "bricks=[a,b]", "name=ab", "search=cma_es", "search.trials=6",
        "evaluation.bootstrap=20",
    ]  # fmt: skip

    def record_of(out: str) -> tuple[dict[str, Any], Path]:
        path = Path(out.splitlines()[-1].removeprefix("record: "))
        return json.loads(path.read_text()), path.parent

    capsys.readouterr()
    assert main([*search, "tracking=disabled", "outputs=whole", "library=outputs/library"]) == 0
    whole, at = record_of(capsys.readouterr().out)
    env = {**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent)}
    for moment, kept in (("3", 2), ("report", 6), ("1", 6)):
        command = [sys.executable, "-c", KILLED, moment, *search, "tracking.mode=offline"]
        ended = subprocess.run(command, env=env, capture_output=True, text=True)
        killed = -signal.SIGKILL if moment != "1" else 0  # the last start has nothing to try
        assert ended.returncode == killed, ended.stderr[-3000:]
        (trials,) = tmp_path.glob("outputs/runs/merge-linear/*/trials.jsonl")
        assert len(read(trials)) == kept
    broken, folder = record_of(ended.stdout)
    for key in ("search", "metrics", "matrix", "config_hash"):
        assert broken[key] == whole[key]
    assert broken["brick"]["version"] == whole["brick"]["version"]
    for name in ("trials.jsonl", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (at / name).read_bytes()
    logged: Counter[tuple[int, float]] = Counter()
    for log in folder.glob("wandb/offline-run-*/*.wandb"):
        inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
        out = subprocess.run(inspect, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        for line in out.stdout.splitlines():
            item = json.loads(line).get("history", {}).get("item", {})
            if "search/loss" in item:
                logged[item["_step"], item["search/loss"]] += 1
    rows = MetricsFile(folder / "metrics.jsonl").rows()
    assert logged == Counter((row["step"], row["search/loss"]) for row in rows)
    assert set(logged.values()) == {1} and len(logged) == 6
