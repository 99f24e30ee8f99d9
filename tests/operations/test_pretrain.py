"""A backbone from text alone: what is written, what it is judged by, what is refused, a kill."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cfm_train.launch.cli import main
from cfm_train.launch.job import prepare
from cfm_train.operations.pretrain import parameters

WORDS = [
    "the",
    "cat",
    "dog",
    "runs",
    "sees",
    "red",
    "blue",
    "tree",
    "house",
    "river",
    "walks",
    "over",
    "under",
    "then",
    "fast",
    "moon",
]
SMALL = [
    "recipe=backbone/pretrain",
    "data.root=texts",
    "data.leave_out=[odd]",
    "data.max_length=24",
    "architecture.hidden_size=32",
    "architecture.intermediate_size=64",
    "architecture.num_hidden_layers=2",
    "architecture.num_attention_heads=2",
    "architecture.num_key_value_heads=1",
    "tokenizer.vocab_size=300",
    "trainer.max_steps=6",
    "trainer.validate_every=3",
    "trainer.tokens_per_batch=256",
    "trainer.samples=1",
    "evaluation.bootstrap=20",
    "tracking=disabled",
]


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three domains, the last with words of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    draw = random.Random(0)
    for domain, words in (("first", WORDS), ("second", WORDS[::2]), ("odd", ["zyzzyva", "qoph"])):
        for split, lines in (("train", 120), ("valid", 20)):
            text = "\n".join(" ".join(draw.choices(words, k=8)) + "." for _ in range(lines))
            (tmp_path / "texts" / f"{domain}.{split}.txt").write_text(text, encoding="utf-8")
    return tmp_path


def record_of(capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, Any]:
    """The record of a run in this process."""
    assert main([*SMALL, *overrides]) == 0
    path = capsys.readouterr().out.splitlines()[-1].removeprefix("record: ")
    return dict(json.loads(Path(path).read_text()))


def exact_loss(folder: Path, text: str, length: int) -> float:
    """Nats per token by transformers alone: pieces of ``length`` tokens, one at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(ids[:-1]) == text
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, length - 1):
        piece = torch.tensor([ids[start : start + length]])
        with torch.no_grad():
            total += model(piece, labels=piece).loss.item() * (piece.shape[1] - 1)
        count += piece.shape[1] - 1
    assert count == len(ids) - 1  # every token but the first, once
    return total / count


@pytest.mark.slow
def test_a_model_folder_that_is_what_the_record_says(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of(capsys, "out=made", "snapshots=[0,3]", "trainer.learning_rate=0.01")
    made = texts / "made"
    assert record["status"] == "done" and all(c["passed"] for c in record["checks"].values())
    for domain in ("first", "second", "odd"):
        text = (texts / "texts" / f"{domain}.valid.txt").read_text()
        figure = record["metrics"][f"test/{domain}/loss"]
        expected = exact_loss(made, text, 24)
        assert figure["value"] == pytest.approx(expected, rel=1e-4)
        assert figure["low"] <= figure["value"] <= figure["high"]
        from transformers import AutoTokenizer

        tokens = len(AutoTokenizer.from_pretrained(made)(text)["input_ids"])
        bits = record["metrics"][f"test/{domain}/bits_per_byte"]["value"]
        assert bits == pytest.approx(expected * tokens / len(text.encode()) / 0.693147, rel=1e-4)
    # Training helped, snapshots are of their steps, and the last is not the first.
    first = (texts / "texts" / "first.valid.txt").read_text()
    losses = [exact_loss(made / "snapshots" / f"step-{n}", first, 24) for n in (0, 3)]
    assert losses[0] > losses[1] > record["metrics"]["test/first/loss"]["value"]
    # Nothing of the domain that was left out is in the vocabulary; it is judged all the same.
    vocabulary = json.loads((made / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocabulary) == 300 and "Ġcat" in vocabulary and "zz" not in vocabulary
    note = json.loads((made / "pretrain.json").read_text())
    assert note["data"]["left_out"] == ["odd"]
    # The count that a dry run tells is that of the weights.
    job = prepare([*SMALL, "out=made", "snapshots=[0,3]", "trainer.learning_rate=0.01"])
    assert parameters(job.config) == record["cost"]["trainable_parameters"]
    from cfm_train.library.store import Library

    card = Library("outputs/library").find("pretrained")
    assert card.kind == "backbone" and card.operation == "pretrain"
    assert card.expression == "pretrain([first, second])"
    assert not Library("outputs/library").verify("pretrained")
    # The samples show what was given and what followed, not the top of a long document each time.
    (sample,) = record["samples"]
    at = first.index(sample["input"]) + len(sample["input"])
    assert first[at:].lstrip().startswith(sample["reference"])
    # It is a backbone like any other.
    (texts / "rows.jsonl").write_text("\n".join(json.dumps({"text": w}) for w in WORDS))
    more = ["recipe=task/lm", "name=brick", "backbone.path=made", "data.train=rows.jsonl"]
    assert main([*more, "trainer.max_steps=2", "tracking=disabled", "data.max_length=8"]) == 0


@pytest.mark.slow
def test_mixed_precision_keeps_its_weights_in_float32(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["trainer.precision=bfloat16", "dtype=float32", "out=mixed"]
    record = record_of(capsys, *more)
    assert record["status"] == "done" and all(c["passed"] for c in record["checks"].values())
    from safetensors.torch import load_file

    weights = load_file(texts / "mixed" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    finer = [not torch.equal(v, v.bfloat16().float()) for v in weights.values() if v.ndim == 2]
    assert all(finer)  # numbers that bfloat16 does not hold


WRONG = {
    "data.domains=[frist]": "has no domain 'frist'. Did you mean 'first'?",
    "data.leave_out=[odd,odd]": "'odd' is listed twice",
    "data.leave_out=[first,second,odd]": "leaves no domain to train on",
    "data.root=nowhere": "there is no folder nowhere",
    "architecture.hidden_size=34": "no even multiple of num_attention_heads=2",
    "architecture.num_key_value_heads=3": "no multiple of num_key_value_heads=3",
    "data.max_length=2000": "more than architecture.max_position_embeddings=1024",
    "trainer.patience=2": "trainer.patience would stop by the held-out text",
    "snapshots=[7]": "there is no step 7 in 6 steps",
    "tokenizer.vocab_size=100": "tokenizer.vocab_size",
    "out=texts": "is there already",
}


@pytest.mark.parametrize("override", WRONG)
def test_what_cannot_be_is_refused(
    override: str, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(texts.rglob("*"))
    assert main([*SMALL, "out=made", override]) == 2
    said = capsys.readouterr().err.strip()
    assert WRONG[override] in said and "\n" not in said
    assert sorted(texts.rglob("*")) == before


def test_a_snapshot_that_would_never_come(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How many steps an epoch has is known once the text is tokenised."""
    never = ["out=made", "snapshots=[9999]", "trainer.max_steps=null", "trainer.epochs=1"]
    assert main([*SMALL, *never]) == 1
    assert "there is no step 9999 in" in capsys.readouterr().err
    assert not (texts / "made").exists()


def test_a_domain_without_its_validation_file_is_refused(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (texts / "texts" / "second.valid.txt").unlink()
    assert main([*SMALL, "out=made"]) == 2
    assert "second.valid.txt" in capsys.readouterr().err


def test_what_validation_holds_is_not_trained_on(texts: Path) -> None:
    line = "the very same line of both"
    for name in ("first.train", "odd.valid", "second.train", "second.valid"):
        path = texts / "texts" / f"{name}.txt"
        path.write_text(f"{path.read_text()}\n{line}")
    corpora = prepare([*SMALL, "out=made", "data.unit=line"]).inputs.corpora
    assert line not in [row["text"][0] for row in corpora.text.rows["train"]]
    assert corpora.text.leaks.counts == {"train in validation": 2}
    assert line in [row["text"][0] for row in corpora.domains["odd"].rows["validation"]]


@pytest.mark.slow
def test_killed_is_not_lost(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL after some steps, the same command again: the same folder, to the byte."""
    long = ["trainer.max_steps=40", "trainer.checkpoint_every=5", "snapshots=[20]"]
    whole = record_of(capsys, *long, "out=whole", "outputs=a", "library=a/library")
    command = [sys.executable, "-m", "cfm_train", *SMALL, *long, "out=broken"]
    command += ["outputs=b", "library=b/library"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ)
    )
    until = time.monotonic() + 120
    while not list(texts.glob("b/runs/*/*/checkpoints/last.ckpt")) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = record_of(capsys, *long, "out=broken", "outputs=b", "library=b/library")
    assert again["metrics"] == whole["metrics"]
    assert again["brick"]["version"] == whole["brick"]["version"]
    for name in ("model.safetensors", "tokenizer.json", "snapshots/step-20/model.safetensors"):
        assert (texts / "broken" / name).read_bytes() == (texts / "whole" / name).read_bytes()
