"""What the YAML folders hold: recipes and group options with their one-line purpose.

Read from the files' first comment lines alone: no Hydra, no YAML parser, so that ``--help`` and an
error that names the nearest recipe answer at once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from cfm_train import paths


@dataclass(frozen=True)
class Entry:
    """One YAML file.

    Attributes:
        name: what is written after ``recipe=`` or ``<group>=``, for example ``task/sst2``.
        purpose: the first comment line of the file.
        needs: the keys that a person must give, from the line ``# needs: …``; empty if none.
        path: the file.
    """

    name: str
    purpose: str
    needs: tuple[str, ...]
    path: Path


def recipes(root: Path | None = None) -> dict[str, Entry]:
    """Every recipe under ``recipes/``, by name, sorted."""
    return _entries((root or paths.ROOT) / "recipes")


def groups(root: Path | None = None) -> dict[str, dict[str, Entry]]:
    """Every group of ``conf/`` with its options: ``{"brick": {"lora": Entry}, …}``."""
    conf = (root or paths.ROOT) / "conf"
    return {folder.name: _entries(folder) for folder in sorted(conf.iterdir()) if folder.is_dir()}


@functools.cache
def _entries(folder: Path) -> dict[str, Entry]:
    files = sorted(folder.rglob("*.yaml")) if folder.is_dir() else []
    entries = (_entry(folder, path) for path in files)
    return {entry.name: entry for entry in entries if not _hidden(entry.name)}


def _hidden(name: str) -> bool:
    return name.rsplit("/", 1)[-1].startswith("_")  # a base that others build on


def _entry(folder: Path, path: Path) -> Entry:
    purpose, needs = "", tuple[str, ...]()
    for line in path.read_text("utf-8", "replace").splitlines():
        if line.strip() and not line.startswith("#"):
            break
        comment = line.lstrip("# ").strip()
        if comment.startswith("needs:"):
            needs = tuple(comment.removeprefix("needs:").replace(",", " ").split())
        elif not purpose and not comment.startswith("@"):
            purpose = comment
    return Entry(path.relative_to(folder).with_suffix("").as_posix(), purpose, needs, path)
