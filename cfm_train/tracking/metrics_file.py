"""``metrics.jsonl``: one JSON object per line, appended as the run goes; the truth about curves.

A row is ``{"step": 120, "train/loss": 0.31, …}``. Each row reaches the operating system in one
write before the next step starts, so a SIGKILL loses at most the row being written. A resumed run
cuts the file back to its checkpoint: the steps after it will be run, and logged, again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cfm_train.errors import UserError
from cfm_train.tracking.atomic import append_line, replace_file


class MetricsFile:
    """Appends rows to, reads, and cuts back one ``metrics.jsonl``.

    Args:
        path: the file; made at the first row if it is not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, step: int, values: Mapping[str, float | int | str | bool | None]) -> None:
        """Adds one row.

        Args:
            step: the optimiser step after which the values hold.
            values: flat scalars; ``step`` is not among them.

        Raises:
            ValueError: a value is not finite (the run must stop before that) or not a scalar.
        """
        row = {"step": int(step), **{key: _scalar(key, value) for key, value in values.items()}}
        append_line(self.path, json.dumps(row, ensure_ascii=False, allow_nan=False))

    def rows(self) -> list[dict[str, Any]]:
        """All complete rows in file order; a last line without its newline is torn and left out.

        Raises:
            UserError: a line in the middle of the file is not a row.
        """
        return list(self._read())

    def cut_back(self, step: int) -> int:
        """Drops every row after ``step``, and a torn last line, atomically.

        Args:
            step: the checkpoint's optimiser step.

        Returns:
            How many complete rows were dropped.
        """
        if not self.path.exists():
            return 0
        rows = self.rows()
        kept = [row for row in rows if row["step"] <= step]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        replace_file(self.path, text.encode())
        return len(rows) - len(kept)

    def _read(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn
            try:
                row = json.loads(line)
                row["step"] += 0  # an object with a number for its step, or one of the errors below
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{self.path}:{number}: not a row of metrics ({error}); "
                    "remove the line or the run folder."
                ) from None
            yield row


def _scalar(key: str, value: Any) -> float | int | str | bool | None:
    """A JSON scalar from a Python, NumPy or zero-dimensional torch one."""
    if key == "step":
        raise ValueError("step: is given beside the values, not among them")
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key}: {value} cannot be logged; stop the run first")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{key}: a {type(value).__name__} is not a scalar")
