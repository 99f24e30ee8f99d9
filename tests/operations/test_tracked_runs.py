"""What a training run leaves in W&B, read back by W&B's own code; and runs within a sequence."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cfm_train.launch.cli import main
from cfm_train.library.store import Library
from cfm_train.tracking.metrics_file import MetricsFile

SHORT = ["data.limit=32", "trainer.max_steps=4", "trainer.validate_every=2", "trainer.samples=2",
         "evaluation.bootstrap=20"]  # fmt: skip


def inspect(folder: Path) -> list[dict[str, Any]]:
    """All records of a run that was written offline."""
    (log,) = folder.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    out = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    return [json.loads(line) for line in out.stdout.splitlines()]


@pytest.mark.slow
def test_a_run_in_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Job type, group, every row of metrics once, and the brick with the digests of its files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    code = main([
        "recipe=task/quick_tense", "name=mine", "tracking.mode=offline", "tracking.group=g1", *SHORT
    ])  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0, err[-2000:]
    folder = Path(out.splitlines()[-1].removeprefix("record: ")).parent
    record = json.loads((folder / "record.json").read_text())
    found = inspect(folder)
    (begun,) = [r["run"] for r in found if r["type"] == "run"][:1]
    assert (begun["job_type"], begun["run_group"]) == ("train", "g1")
    assert begun["run_id"] == record["wandb"]["id"]
    history = Counter(
        (item["_step"], key, value)
        for r in found
        if r["type"] == "history"
        for item in [r["history"]["item"]]
        for key, value in item.items()
        if key.startswith(("train/", "validation/"))
    )
    written = MetricsFile(folder / "metrics.jsonl").rows()
    assert history == Counter((r["step"], k, r[k]) for r in written for k in r if k != "step")
    assert [r["step"] for r in written if "train/loss" in r] == [1, 2, 3, 4]
    brick = Path(record["brick"]["path"])
    text = json.dumps([r for r in found if r["type"] == "artifact"])
    for file in brick.iterdir():
        digest = base64.b64encode(hashlib.md5(file.read_bytes()).digest()).decode()
        assert file.name in text and digest in text, file.name
    (ended,) = [r for r in found if r["type"] == "exit"]
    assert not ended["exit"].get("exit_code")


@pytest.mark.slow
def test_a_sequence_hands_down_library_outputs_and_tracking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each step is an ordinary run, in the sequence's own places."""
    monkeypatch.chdir(tmp_path)
    steps = [["recipe=task/quick_tense", "name=a", *SHORT]]
    steps.append(["recipe=task/quick_claim", "name=b", "seed=1", *SHORT])
    steps.append(["recipe=merge/linear", "bricks=[a,b]", "name=ab"])
    monkeypatch.setenv("CFM_LIBRARY", str(tmp_path / "elsewhere"))
    code = main([
        "recipe=quickstart", f"steps={json.dumps(steps)}", "library=mine", "outputs=here",
        "tracking=disabled",
    ])  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0, err[-2000:]
    assert [line[:5] for line in out.splitlines() if line.startswith("[")] == [
        "[1/3]",
        "[2/3]",
        "[3/3]",
    ]
    assert sorted(Library(tmp_path / "mine").names()) == ["a", "ab", "b"]
    assert not (tmp_path / "elsewhere").exists() and not (tmp_path / "outputs").exists()
    records = [json.loads(p.read_text()) for p in Path("here").glob("runs/*/*/record.json")]
    seeds = {r["name"]: r["seed"] for r in records if r["operation"] == "train"}
    assert seeds == {"a": 0, "b": 1}
    assert all(r["wandb"]["mode"] == "disabled" for r in records if r["operation"] == "train")
