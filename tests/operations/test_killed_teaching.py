"""Teaching that is killed goes on after its last whole group, and comes to the same brick."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cfm_train import paths
from cfm_train.launch.cli import main
from cfm_train.tracking.metrics_file import MetricsFile
from tests.backbones import folder
from tests.fact_cases import TOLD

#: The command, killed in the third step of the second group, or when all facts are judged.
KILLED = """
import os, signal, sys
from cfm_train.knowledge import fact_figures, teach
from cfm_train.launch.cli import main

moment, steps, adam = sys.argv[1], [], teach._adam

def killed(*given, **more):
    os.kill(os.getpid(), signal.SIGKILL)

def counted(*given):
    steps.append(given[5])
    return killed() if steps[-2:] == [2, 3] and steps.count(1) == 2 else adam(*given)

if moment == "step":
    teach._adam = counted
if moment == "judged":
    fact_figures.judge = killed
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("brick", ["neurons", "rows", "cartridge_facts"])
def test_sigkill_changes_nothing(
    brick: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Brick, figures and curve are the unbroken run's to the bit, and W&B has each row once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    rows = "".join(json.dumps(fact.taught()) + "\n" for fact in TOLD)
    Path("facts.jsonl").write_text(rows)
    command = [
        "recipe=knowledge/facts", "name=told", "backbone=hf", f"backbone.path={folder('llama')}",
        f"brick={brick}", "data.facts=facts.jsonl", "teaching.steps=4",
        "teaching.facts_per_group=1", "teaching.contexts=2", "evaluation.bootstrap=20",
    ]  # fmt: skip

    def record_of(out: str) -> tuple[dict[str, Any], Path]:
        path = Path(out.splitlines()[-1].removeprefix("record: "))
        return json.loads(path.read_text()), path.parent

    assert main([*command, "tracking=disabled", "outputs=whole", "library=whole/library"]) == 0
    whole, at = record_of(capsys.readouterr().out)
    env = {**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent)}
    for moment, kept in (("step", 1), ("judged", 3), ("never", 3)):
        started = [sys.executable, "-c", KILLED, moment, *command, "tracking.mode=offline"]
        ended = subprocess.run(started, env=env, capture_output=True, text=True)
        killed = 0 if moment == "never" else -signal.SIGKILL
        assert ended.returncode == killed, ended.stderr[-3000:]
        groups = list(tmp_path.glob("outputs/runs/knowledge-facts/*/checkpoints/*.safetensors"))
        assert len(groups) == kept
        if killed:
            assert not list(tmp_path.glob("outputs/library/told/*/brick.json"))
    broken, run = record_of(ended.stdout)
    assert broken["config_hash"] == whole["config_hash"]
    assert broken["brick"]["version"] == whole["brick"]["version"]
    ours, theirs = (load_file(Path(one["brick"]["path"]) / "brick.safetensors")
                    for one in (broken, whole))  # fmt: skip
    assert ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)
    for one in (broken, whole):
        del one["metrics"]["seconds_per_fact"]
    assert broken["metrics"] == whole["metrics"] and broken["samples"] == whole["samples"]
    assert (run / "metrics.jsonl").read_bytes() == (at / "metrics.jsonl").read_bytes()
    logged: Counter[tuple[int, float]] = Counter()
    for log in run.glob("wandb/offline-run-*/*.wandb"):
        inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
        out = subprocess.run(inspect, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        for line in out.stdout.splitlines():
            item = json.loads(line).get("history", {}).get("item", {})
            if "train/loss" in item:
                logged[item["_step"], item["train/loss"]] += 1
    written = MetricsFile(run / "metrics.jsonl").rows()
    assert logged == Counter((row["step"], row["train/loss"]) for row in written)
    assert set(logged.values()) == {1} and len(logged) == 12
