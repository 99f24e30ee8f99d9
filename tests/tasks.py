"""Small tasks of every type for the tiny backbones: random words whose answers can be learnt."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

from cfm_train.backbone.load import Backbone
from cfm_train.config.compose import option
from cfm_train.data.encode import Encoded, TaskData, encode
from cfm_train.data.sources import check_all

TYPES = ("classification", "multilabel", "regression", "token", "causal", "instruct", "seq2seq")

#: The ``trainer`` section of short runs.
TRAINER: dict[str, Any] = {
    **option("trainer", "default", learning_rate=1e-2),
    "precision": "float32",
    "rows_per_batch": 8,
    "samples": 0,
}

_COLUMNS: dict[str, dict[str, Any]] = {
    "classification": {"text": "text", "label": "label", "labels": ["no", "yes"]},
    "multilabel": {"text": "text", "label": "label", "labels": ["a", "b", "c"]},
    "regression": {"text": "text", "label": "label"},
    "token": {"text": "tokens", "label": "label", "labels": ["O", "B-X", "I-X"]},
    "causal": {"text": "text", "pack": False},
    "instruct": {"text": "text", "target": "target", "max_length": 96},
    "seq2seq": {"text": "text", "target": "target"},
}


def raw_row(task: str, draw: random.Random, shortest: int = 2, longest: int = 12) -> dict[str, Any]:
    """One row as a person's file has it: 2 to 12 words, the answer a function of them."""
    numbers = [draw.randrange(3, 64) for _ in range(draw.randint(shortest, longest))]
    words = [f"w{n}" for n in numbers]
    row: dict[str, Any] = {"text": " ".join(words)}
    if task == "classification":
        row["label"] = ("no", "yes")[numbers[0] % 2]
    elif task == "multilabel":
        row["label"] = [n for n, k in (("a", 3), ("b", 4), ("c", 5)) if numbers[0] % k == 0]
    elif task == "regression":
        row["label"] = numbers[0] / 64
    elif task == "token":
        row = {"tokens": words, "label": [("O", "B-X")[n % 2] for n in numbers]}
    elif task in ("instruct", "seq2seq"):
        row["target"] = " ".join(words[:3][::-1])
    return row


def section(task: str, folder: Path, *, rows: int = 40, seed: int = 0, **keys: Any) -> Any:
    """A data section with files for it in ``folder``: train, and a quarter as many for the others.

    Args:
        task: the task's type.
        folder: where the files go.
        rows: training rows.
        seed: draws the rows.
        keys: keys of the section that differ from ``conf/data/custom.yaml``.
    """
    draw = random.Random(f"{task} {seed}")
    named = {"name": task, "task": task, **_COLUMNS[task]}
    for split, count in (("train", rows), ("validation", rows // 4), ("test", rows // 4)):
        path = folder / f"{task}-{seed}.{split}.jsonl"
        lines = [json.dumps(raw_row(task, draw)) for _ in range(count)]
        path.write_text("\n".join(lines) + "\n")
        named[split] = str(path)
    return {**option("data", "custom", name=task), **named, **keys}


def task_data(backbone: Backbone, task: str, **keys: Any) -> TaskData:
    """A task read from files and tokenised for a backbone; see `section`."""
    with tempfile.TemporaryDirectory() as folder:
        (checked,) = check_all(section(task, Path(folder), **keys))
        return encode(checked, backbone.tokenizer, Path(folder) / "cache")


def whole_batch(backbone: Backbone, task: str, encoded: Encoded, rows: Any = range(6)) -> Any:
    """The first rows as one batch, padded to different lengths."""
    from cfm_train.training.dataset import make_batch

    return make_batch(task, encoded, rows, backbone.tokenizer.pad_token_id)
