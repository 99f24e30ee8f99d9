"""Fingerprints: what they cover, and when a cached hash is used again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cfm_train.backbone import fingerprint as fp
from cfm_train.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CFM_CACHE", str(folder))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer.json").write_text("{}")
    save_file({"w": np.arange(6, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_fingerprint_is_the_hash_of_names_and_hashes(model: Path) -> None:
    lines = [f"{n}:{sha(model / n)}\n" for n in ("config.json", "model.safetensors")]
    assert fp.fingerprint(model) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_fingerprint_covers_config_and_weights_and_nothing_else(model: Path) -> None:
    first = fp.fingerprint(model)
    (model / "README.md").write_text("words")
    (model / "tokenizer.json").write_text('{"a": 1}')
    assert fp.fingerprint(model) == first
    (model / "config.json").write_text('{"model_type": "bert", "x": 1}')
    second = fp.fingerprint(model)
    assert second != first
    save_file({"w": np.arange(6, dtype=np.float32) + 1}, model / "model.safetensors")
    assert fp.fingerprint(model) != second


def test_shards_count_each(model: Path) -> None:
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    for at in (1, 2):
        save_file({"a": np.zeros(at, np.float32)}, model / f"model-{at}.safetensors")
    first = fp.fingerprint(model)
    save_file({"a": np.ones(2, np.float32)}, model / "model-2.safetensors")
    assert fp.fingerprint(model) != first


def test_tokenizer_hash_covers_every_tokenizer_file(model: Path) -> None:
    first = fp.tokenizer_hash(model)
    (model / "config.json").write_text('{"model_type": "gpt2"}')
    assert fp.tokenizer_hash(model) == first
    (model / "special_tokens_map.json").write_text("{}")
    assert fp.tokenizer_hash(model) != first


def test_a_folder_without_tokenizer_is_refused(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        fp.tokenizer_hash(model)


def test_a_hash_is_used_again_until_size_or_time_change(model: Path, cache: Path) -> None:
    path = model / "model.safetensors"
    true = fp.file_hash(path)
    assert true == sha(path)
    (entry,) = (cache / "hashes").iterdir()
    known = json.loads(entry.read_text())
    # A mark in the cache shows whether the file was read again.
    entry.write_text(json.dumps({**known, "sha256": "f" * 64}))
    assert fp.file_hash(path) == "f" * 64
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert fp.file_hash(path) == true


def test_a_link_is_the_file_it_points_to(model: Path, tmp_path: Path, cache: Path) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(model / "model.safetensors")
    assert fp.file_hash(link) == fp.file_hash(model / "model.safetensors")
    assert len(list((cache / "hashes").iterdir())) == 1


@pytest.mark.parametrize("content", ["", "[]", "{", '{"path": 3}'])
def test_a_broken_cache_entry_is_made_anew(model: Path, cache: Path, content: str) -> None:
    path = model / "config.json"
    true = fp.file_hash(path)
    (entry,) = (cache / "hashes").iterdir()
    entry.write_text(content)
    assert fp.file_hash(path) == true


def test_a_cache_that_cannot_be_written_does_no_harm(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CFM_CACHE", str(tmp_path / "file"))
    assert fp.file_hash(model / "config.json") == sha(model / "config.json")


def test_a_missing_file_is_one_sentence(model: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(UserError, match=r"Cannot read .*config\.json"):
        fp.fingerprint(model)


def test_long_hashes_show_how_far_they_are(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fp, "SHOW_PROGRESS_BYTES", 1)
    path = model / "model.safetensors"
    assert fp.file_hash(path) == sha(path)
    assert "hashing model.safetensors" in capsys.readouterr().err
