"""Series from bytes: rows of numbers, one for each step in time, a column for each channel.

    .npy      an array [steps] or [steps, channels]
    .csv      a line for each step, its numbers between commas; a first line of names is passed over
    [1, 2]    JSON, as it stands within a row: a list of steps, each a number or a list of channels

They come out the same, whichever way they were written.
"""

from __future__ import annotations

import csv
import io
import json

import numpy as np

from cfm_train.errors import UserError


def read_series(content: bytes, at: str, channels: int) -> np.ndarray:
    """A series as float32 ``[steps, channels]``.

    Args:
        content: what an item holds, see the module.
        at: where it stands, for the error sentence.
        channels: how many it must have.

    Raises:
        UserError: it is no series, or has other channels.
    """
    try:
        found = _numbers(content)
    except (ValueError, TypeError, EOFError, csv.Error) as error:  # JSON's are ValueErrors
        raise UserError(
            f"{at}: is no series of numbers ({error}); write .npy, .csv or a list of steps."
        ) from None
    with np.errstate(over="ignore"):  # what float32 cannot hold is no finite number of it
        found = found.astype(np.float32)
    found = found[:, None] if found.ndim == 1 else found
    if found.ndim != 2 or not found.size or not np.isfinite(found).all():
        raise UserError(
            f"{at}: a series is finite numbers [steps, channels], found {found.shape}; fill gaps "
            "before."
        )
    if found.shape[1] != channels:
        raise UserError(
            f"{at}: the series has {found.shape[1]} channels, and encoder.channels={channels}."
        )
    return found


def _numbers(content: bytes) -> np.ndarray:
    """Whatever array of float64 the bytes hold."""
    if content.startswith(b"\x93NUMPY"):
        return np.load(io.BytesIO(content), allow_pickle=False).astype(np.float64)
    text = content.decode("utf-8-sig").strip()
    if text.startswith("["):
        return np.asarray(json.loads(text), np.float64)
    lines = [line for line in csv.reader(io.StringIO(text)) if line]
    if lines and any(lines[0]) and not any(_is_number(cell) for cell in lines[0]):
        lines = lines[1:]
    return np.asarray([[float(cell) for cell in line] for line in lines], np.float64)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
