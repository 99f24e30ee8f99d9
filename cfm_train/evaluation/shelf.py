"""Evaluations that records already hold: the same question is not put to a model twice.

A run keeps what each row added to the metrics (`contributions`) in ``examples.safetensors`` beside
its record, under a key that covers everything that decides it: the body, the head, the rows, the
backbone, the code (`scorer.key_of`). Figures, intervals and paired comparisons are made from that
again, so a reused cell is the very cell that an earlier run wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cfm_train.evaluation.examples import Examples

FILE = "examples.safetensors"


class Shelf:
    """Examples by key: those of earlier runs, and those that this run adds.

    Args:
        runs: the folder with ``<recipe>/<run>/record.json``; None where nothing is to be reused.
    """

    def __init__(self, runs: Path | None) -> None:
        self._places = {} if runs is None else _places(runs)
        self._own: dict[str, Examples] = {}

    def find(self, key: str, labels: tuple[str, ...] | None) -> tuple[Examples, str | None] | None:
        """The examples under a key and the run that made them, ``<recipe>/<run>``; None for this
        one.

        What cannot be read any more (a folder that was emptied, a damaged file) is not there: it is
        evaluated again.

        Args:
            key: see `scorer.key_of`.
            labels: the task's labels.
        """
        if key in self._own:
            return self._own[key], None
        folder = self._places.get(key)
        if folder is None:
            return None
        try:
            with safe_open(folder / FILE, framework="numpy") as file:
                names = [name for name in file.keys() if name.startswith(f"{key}/")]  # noqa: SIM118
                parts = {name.split("/", 1)[1]: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError):
            return None
        if not parts or not all(np.isfinite(rows).all() for rows in parts.values()):
            return None
        # The order of parts decides which metrics come first; files are sorted by name.
        ordered = dict(sorted(parts.items(), key=lambda part: part[0] != "seq2seq"))
        return Examples(ordered, labels), f"{folder.parent.name}/{folder.name}"

    def keep(self, key: str, examples: Examples) -> None:
        """Takes in what this run evaluated."""
        self._own[key] = examples

    def write(self, folder: Path) -> dict[str, Any] | None:
        """Writes what this run evaluated into its folder; the ``examples`` of its record."""
        if not self._own:
            return None
        tensors = {
            f"{key}/{kind}": np.ascontiguousarray(rows)
            for key, examples in self._own.items()
            for kind, rows in examples.parts.items()
        }
        (folder / FILE).write_bytes(save(tensors))
        return {"file": FILE, "keys": sorted(self._own)}


def _places(runs: Path) -> dict[str, Path]:
    """The run folder of every key that a finished record names."""
    places: dict[str, Path] = {}
    for path in sorted(runs.glob("*/*/record.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        held = record.get("examples") if isinstance(record, Mapping) else None
        if isinstance(held, Mapping) and record.get("status") == "done":
            for key in held.get("keys", ()):
                places.setdefault(key, path.parent)
    return places
