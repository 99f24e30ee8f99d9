"""Answers as a file: JSON lines, CSV or Parquet, told by the file's ending.

What JSON nests, CSV spreads: a column ``probability of LABEL`` for each label, and a list of labels
or tags as JSON in its cell, as CSV files with such columns are read (see `files`).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfm_train.errors import UserError

#: Endings that answers can be written to.
SUFFIXES = (".jsonl", ".csv", ".parquet")

Answer = Mapping[str, Any]


def check_suffix(path: Path) -> None:
    """Refuses a file whose ending names no format.

    Raises:
        UserError: with the endings that do.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"out: cannot tell from the name {path.name} what to write; end it in one of "
            f"{', '.join(SUFFIXES)}."
        )


def encoded(answers: Sequence[Answer], path: Path) -> bytes:
    """The content of the file.

    Args:
        answers: at least one; all with the same keys: ``prediction`` (text, number or list), and
            maybe ``probabilities`` by label.
        path: where it will be written: only its ending counts.
    """
    kind = path.suffix.lower()
    if kind == ".csv":
        return _csv(answers)
    if kind == ".parquet":
        return _parquet(answers)
    return "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers).encode()


def _csv(answers: Sequence[Answer]) -> bytes:
    rows = [
        {
            "prediction": _cell(answer["prediction"]),
            **{f"probability of {n}": p for n, p in answer.get("probabilities", {}).items()},
        }
        for answer in answers
    ]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


def _parquet(answers: Sequence[Answer]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(a) for a in answers]), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content
