"""Text to token numbers, once: tokenised in batch, kept on disk by fingerprint, mapped into memory.

The key of a cache entry covers the rows, the tokenizer and every setting that changes a number, so
an entry is never stale and never changed. It is written into a temporary folder and renamed: two
processes may make the same entry at once, and neither sees half of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cfm_train.data import encoders
from cfm_train.data.encoders import Arrays, Settings
from cfm_train.data.rows import Row
from cfm_train.data.sources import Checked, fingerprint
from cfm_train.data.tasks import TaskSpec
from cfm_train.errors import UserError

#: Flat arrays that are not as long as ``input_ids`` -> where their rows begin.
OFFSETS = {
    "target_ids": "target_offsets",
    "first_tokens": "word_offsets",
    "block_rows": "block_offsets",
    "context_ids": "context_offsets",
}

#: Raised whenever the numbers in the cache would mean something else.
FORMAT = 1


@dataclass
class Encoded:
    """One split as token numbers.

    Attributes:
        arrays: name -> array. ``input_ids`` (int32, all rows behind each other) and ``offsets``
            (int64, [rows + 1]); ``labels`` by task type; see ``encoders``. ``context_ids`` is what
            a teacher reads before a row (context distillation).
        rows: the rows that the numbers were made from.
        truncated: how many rows were longer than the limit and cut.
        max_length: the limit, in tokens.
    """

    arrays: Arrays
    rows: list[Row]
    truncated: int
    max_length: int
    lengths: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        # Both sides of a pair of sequences are computed, so both count: [rows] or [rows, 2].
        sides = [np.diff(self.arrays["offsets"])]
        for other in ("target_offsets", "context_offsets"):
            if other in self.arrays:
                sides.append(np.diff(self.arrays[other]))
        self.lengths = np.stack(sides, axis=-1) if len(sides) > 1 else sides[0]

    def __len__(self) -> int:
        return len(self.arrays["offsets"]) - 1

    def slice(self, name: str, index: int) -> np.ndarray:
        """The part of a flat array that belongs to one row."""
        offsets = self.arrays[OFFSETS.get(name, "offsets")]
        return self.arrays[name][offsets[index] : offsets[index + 1]]

    def extras(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """What a batch of these rows holds besides token numbers; nothing where all is text."""
        return {}

    def row(self, index: int) -> Row:
        """The row a batch's ``index`` points to, with ``_at``, where it stood.

        A block of several documents comes as one row of several texts.
        """
        if "block_rows" not in self.arrays:
            return self.rows[index]
        held = [self.rows[i] for i in self.slice("block_rows", index)]
        return {
            "text": [row["text"][0] for row in held],
            "_at": ", ".join(row["_at"] for row in held),
        }


@dataclass
class TaskData:
    """A task ready to train: its spec and its splits; validation and test may be absent."""

    spec: TaskSpec
    train: Encoded
    validation: Encoded | None
    test: Encoded | None


def encode(checked: Checked, tokenizer: Any, cache: Path) -> TaskData:
    """Tokenises a task's splits, or finds them in the cache.

    Args:
        checked: the task's rows.
        tokenizer: the backbone's, a fast one.
        cache: the folder for things that can be made again; entries go to ``cache/encoded``.

    Raises:
        UserError: the tokenizer is not a fast one.
    """
    splits = {
        split: encode_rows(
            rows, checked.spec, checked.section, tokenizer, cache, checked.fingerprints[split]
        )
        for split, rows in checked.rows.items()
        if rows
    }
    return TaskData(checked.spec, splits["train"], splits.get("validation"), splits.get("test"))


def encode_rows(
    rows: list[Row],
    spec: TaskSpec,
    section: Mapping[str, Any],
    tokenizer: Any,
    cache: Path,
    rows_fingerprint: str | None = None,
) -> Encoded:
    """Tokenises rows of one task, or finds them in the cache.

    Args:
        rows: rows of ``spec``'s type; they may lack answers (predict).
        spec: the task.
        section: the data section, for the limits on length.
        tokenizer: a fast tokenizer.
        cache: see ``encode``.
        rows_fingerprint: ``sources.fingerprint(rows)`` where it is known.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"backbone: the tokenizer of {tokenizer.name_or_path} has no fast version "
            "(tokenizer.json); convert it with transformers, then run again."
        )
    settings = Settings(
        max_length=min(section["max_length"], tokenizer.model_max_length),
        target_max_length=section["target_max_length"],
        pack=section["pack"],
    )
    key = hashlib.sha256(
        json.dumps(
            [
                FORMAT,
                rows_fingerprint or fingerprint(rows),
                tokenizer_fingerprint(tokenizer),
                spec.type,
                spec.labels,
                asdict(settings),
            ]
        ).encode()
    ).hexdigest()
    entry = cache / "encoded" / key[:32]
    found = _load(entry)
    if found is None:
        encoder = getattr(encoders, f"encode_{spec.type}")
        arrays, truncated = encoder(rows, spec, tokenizer, settings)
        _store(entry, arrays, truncated)
        found = _load(entry) or (arrays, truncated)
    return Encoded(found[0], rows, found[1], settings.max_length)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what a fast tokenizer does: vocabulary, rules, special tokens, chat template."""
    backend = tokenizer.backend_tokenizer
    # Truncation and padding of the last call stay in the backend, and are no part of what it is.
    backend.no_truncation()
    backend.no_padding()
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    content = json.dumps([backend.to_str(), special, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _load(entry: Path) -> tuple[Arrays, int] | None:
    """The arrays of a cache entry, mapped into memory; None where it is absent or damaged."""
    try:
        meta = json.loads((entry / "meta.json").read_text())
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in meta["arrays"]}
    except (OSError, ValueError, KeyError):
        return None
    if any(list(arrays[name].shape) != shape for name, shape in meta["arrays"].items()):
        return None
    return arrays, meta["truncated"]


def _store(entry: Path, arrays: Arrays, truncated: int) -> None:
    """Writes an entry beside its place and renames it there; the first of two writers wins.

    A cache that cannot be written (read-only home, full disk) costs time, not the run.
    """
    meta = {"arrays": {name: list(a.shape) for name, a in arrays.items()}, "truncated": truncated}
    temporary = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=entry.parent))
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        (temporary / "meta.json").write_text(json.dumps(meta))
        if entry.exists() and _load(entry) is None:
            shutil.rmtree(entry, ignore_errors=True)  # damaged: make room
        os.rename(temporary, entry)
    except OSError:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
