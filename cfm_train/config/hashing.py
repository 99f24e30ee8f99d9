"""The config hash: one name for everything that decides a run's result."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cfm_train import paths

#: Keys that say where a run is kept or how it is shown, never what comes out of it.
NOT_DECIDING = frozenset({"tracking", "outputs", "library", "dry_run"})


def config_hash(config: Mapping[str, Any], fingerprints: Mapping[str, str]) -> str:
    """SHA-256 over a validated config, what its inputs contain and the code that reads them.

    Args:
        config: the run's config.
        fingerprints: content hashes of what the config only names (data, backbone, bricks).

    Returns:
        64 hex digits; a run folder's name ends with the first ten.
    """
    deciding = {key: value for key, value in config.items() if key not in NOT_DECIDING}
    if isinstance(deciding.get("trainer"), Mapping):
        trainer = deciding["trainer"]
        deciding["trainer"] = {key: trainer[key] for key in trainer if key != "threads"}
    content = {"config": deciding, "inputs": dict(fingerprints), "code": code_version()}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


@functools.cache
def code_version() -> str:
    """SHA-256 over the package's own Python files, by relative path and content."""
    total = hashlib.sha256()
    for path in sorted(paths.PACKAGE.rglob("*.py")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(paths.PACKAGE).as_posix()} {content}\n".encode())
    return total.hexdigest()
