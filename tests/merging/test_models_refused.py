"""Whole models that cannot be merged: one sentence, exit code 2, nothing changed on disk."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cfm_train.launch.cli import main
from tests.merging.whole_models import HEAD, Tensors, arguments, configure, drawn, write


def _other(where: Path, tensors: Tensors, **changes: Any) -> Path:
    path = write(where / "other", tensors)
    configure(path, **changes)
    return path


def _tokenizer(where: Path) -> Path:
    path = write(where / "other", drawn(2))
    text = (path / "tokenizer.json").read_text().replace('"w9"', '"v9"')
    (path / "tokenizer.json").write_text(text)
    return path


def _without(name: str) -> Tensors:
    return {key: value for key, value in drawn(2).items() if key != name}


def _nan() -> Tensors:
    tensors = drawn(2)
    tensors["model.norm.weight"][3] = float("nan")
    return tensors


REFUSED: dict[str, tuple[Any, list[str], list[str]]] = {
    "config": (lambda w: _other(w, drawn(2), rms_norm_eps=0.1), [], ["rms_norm_eps", "0.1"]),
    "vocabulary": (lambda w: _other(w, drawn(2), vocab_size=65), [], ["vocab_size"]),
    "architecture": (lambda w: _other(w, drawn(2), model_type="mistral"), [], ["mistral"]),
    "quantised": (
        lambda w: _other(w, drawn(2), quantization_config={"bits": 4}),
        [],
        ["quantised"],
    ),
    "tokenizer": (_tokenizer, [], ["different tokenizers"]),
    "missing tensor": (lambda w: _other(w, _without(HEAD)), [], [HEAD, "has not"]),
    "extra tensor": (lambda w: _other(w, {**drawn(2), "extra": torch.ones(2)}), [], ["'extra'"]),
    "tied": (
        lambda w: _other(w, _without(HEAD), tie_word_embeddings=True),
        [],
        ["tie_word_embeddings"],
    ),
    "shape": (
        lambda w: _other(w, {**drawn(2), "model.norm.weight": torch.ones(31).bfloat16()}),
        [],
        ["model.norm.weight", "[31]"],
    ),
    "dtype": (lambda w: _other(w, drawn(2, torch.float32)), [], ["merge.dtype="]),
    "NaN": (lambda w: _other(w, _nan()), [], ["model.norm.weight", "NaN", "other"]),
    "too large": (
        lambda w: write(w / "other", drawn(2)),
        ["merge.dtype=float16", "weights=[1e6,1e6]"],
        ["too large for float16"],
    ),
    "whole numbers": (
        lambda w: _other(w, {**drawn(2), HEAD: torch.ones(64, 32, dtype=torch.int64)}),
        [],
        [HEAD],
    ),
    "no base": (lambda w: write(w / "other", drawn(2)), ["rule=ties"], ["base=DIR"]),
    "no base to scale": (lambda w: write(w / "other", drawn(2)), ["merge.scale=2"], ["base=DIR"]),
    "statistics": (lambda w: write(w / "other", drawn(2)), ["rule=fisher"], ["fisher"]),
    "space": (
        lambda w: write(w / "other", drawn(2)),
        ["rule=ties/knots", "base=BASE"],
        ["merge.space=knots"],
    ),
    "rank": (lambda w: write(w / "other", drawn(2)), ["merge.rank=4"], ["merge.rank"]),
    "weights": (lambda w: write(w / "other", drawn(2)), ["weights=[1]"], ["weights", "2"]),
    "filter": (
        lambda w: write(w / "other", drawn(2)),
        ["merge.filters=[[attn.q,1,0]]"],
        ["attn.q"],
    ),
    "scope": (
        lambda w: write(w / "other", drawn(2)),
        ["rule=tsv", "merge.scope=layer", "base=BASE"],
        ["merge.scope=tensor"],
    ),
    "unknown key": (lambda w: write(w / "other", drawn(2)), ["merge.density=1"], ["density"]),
    "no such model": (lambda w: w / "nowhere", [], ["nowhere"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_sentence_and_nothing_on_disk(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, more, named = REFUSED[case]
    base = write(tmp_path / "base", drawn(0))
    first = write(tmp_path / "first", drawn(1))
    other = make(tmp_path)
    before = snapshot(tmp_path)
    more = [one.replace("BASE", str(base)) for one in more]
    capsys.readouterr()
    assert main(arguments(tmp_path, [first, other], None, *more)) == 2
    error = capsys.readouterr().err
    sentences = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1 and "Traceback" not in error
    for part in named:
        assert part in sentences[0]
    assert snapshot(tmp_path) == before


def snapshot(path: Path) -> dict[str, str]:
    return {
        str(one.relative_to(path)): hashlib.sha256(one.read_bytes()).hexdigest()
        for one in sorted(path.rglob("*"))
        if one.is_file()
    }


def test_out_that_holds_something_and_a_full_disk(
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert main(arguments(tmp_path, models[1:], None)) == 2
    assert "is there already" in capsys.readouterr().err
    (tmp_path / "out" / "mine.txt").unlink()
    assert main([*arguments(tmp_path, models[1:], None), "dry_run=true"]) == 0
    assert not any((tmp_path / "out").iterdir()) and not (tmp_path / "library").exists()
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=67_110_000))
    assert main(arguments(tmp_path, models[1:], None, "name=full")) == 2
    assert "MB free" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", real)
    assert main(arguments(tmp_path, models[1:], None)) == 0


def test_a_merge_that_needs_more_memory_than_there_is(
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from cfm_train.merging.models import whole

    monkeypatch.setattr(whole, "free_memory", lambda: 10_000)
    base, *inputs = models
    more = ["rule=tsv", "dry_run=true"]
    assert main(arguments(tmp_path, inputs, base, *more)) == 2
    assert "GB of memory" in capsys.readouterr().err
    assert main(arguments(tmp_path, inputs, base, "rule=ties", "dry_run=true")) == 0
