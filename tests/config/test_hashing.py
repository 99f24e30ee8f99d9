"""What decides a result changes the config hash; what does not leaves it."""

from __future__ import annotations

import copy
import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from cfm_train import paths
from cfm_train.config import hashing
from cfm_train.config.compose import compose
from cfm_train.config.validate import leaves, validate

INPUTS = {"data": "aa", "backbone": "bb"}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return validate(compose(["recipe=task/sst2"]))


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    copied = copy.deepcopy(config)
    *path, last = key.split(".")
    section = copied
    for part in path:
        section = section[part]
    section[last] = value
    return copied


def test_the_order_of_keys_does_not_count(config: dict[str, Any]) -> None:
    turned = dict(reversed(config.items()))
    first = hashing.config_hash(config, INPUTS)
    assert first == hashing.config_hash(turned, dict(reversed(INPUTS.items())))
    assert len(first) == 64
    assert int(first, 16) >= 0


def test_every_key_counts_but_those_that_decide_nothing(config: dict[str, Any]) -> None:
    before = hashing.config_hash(config, INPUTS)
    same = {
        key
        for key, _ in leaves(config)
        if hashing.config_hash(changed(config, key, "another"), INPUTS) == before
    }
    free = {"library", "outputs", "dry_run", "trainer.threads"}
    assert same == free | {key for key, _ in leaves(config) if key.startswith("tracking.")}


def test_inputs_count(config: dict[str, Any]) -> None:
    before = hashing.config_hash(config, INPUTS)
    assert hashing.config_hash(config, {**INPUTS, "data": "ab"}) != before
    assert hashing.config_hash(config, {"data": "aa"}) != before


def test_the_code_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = tmp_path / "cfm_train"
    shutil.copytree(paths.PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    original = hashing.code_version.__wrapped__()
    monkeypatch.setattr(paths, "PACKAGE", copied)
    assert hashing.code_version.__wrapped__() == original
    with open(copied / "errors.py", "a") as file:
        file.write("# another version\n")
    assert hashing.code_version.__wrapped__() != original


def test_code_version_is_over_names_and_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.py").write_bytes(b"one")
    (tmp_path / "b" / "c.py").write_bytes(b"two")
    (tmp_path / "b" / "page.html").write_bytes(b"not code")
    monkeypatch.setattr(paths, "PACKAGE", tmp_path)
    lines = [
        f"a.py {hashlib.sha256(b'one').hexdigest()}\n",
        f"b/c.py {hashlib.sha256(b'two').hexdigest()}\n",
    ]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert hashing.code_version.__wrapped__() == expected
