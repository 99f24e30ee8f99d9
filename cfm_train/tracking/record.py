"""The record: the one-file result of a run, and the only thing that dashboards are drawn from.

A record is a plain JSON object with stable keys, so that other programs may rely on it. It is
written atomically and never holds a NaN. A run folder can be moved: what lies in it is named
relative to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cfm_train.errors import UserError
from cfm_train.tracking.atomic import replace_file
from cfm_train.tracking.record_schema import Cost, Record

__all__ = ["Record", "new_record", "read_record", "validate", "write_record"]

_EMPTY_COST: Cost = {
    "seconds": 0.0,
    "train_seconds": None,
    "samples_per_second": None,
    "tokens_per_second": None,
    "peak_memory_bytes": None,
    "trainable_parameters": None,
    "flop_share": None,
}


def new_record(
    *, operation: str, recipe: str, name: str, seed: int, config_hash: str, **known: Any
) -> Record:
    """Starts a record with every key in place and nothing in them but what is given.

    Args:
        operation: name of the operation.
        recipe: name of the recipe.
        name: name of the run.
        seed: the run's seed.
        config_hash: hash of everything that decides the result.
        **known: any other keys of the record; ``cost`` may name some of its figures only.

    Returns:
        A record with status ``done``.

    Raises:
        ValueError: a key or a value does not belong into a record.
    """
    cost = {**_EMPTY_COST, **known.pop("cost", {})}
    record = {
        "operation": operation,
        "recipe": recipe,
        "name": name,
        "status": "done",
        "seed": seed,
        "brick": None,
        "backbone": None,
        "metrics": {},
        "checks": {},
        "cost": cost,
        "config_hash": config_hash,
        "versions": {},
        "inputs": {},
        "data": None,
        "matrix": [],
        "samples": [],
        "wandb": None,
        "curves": None,
    }
    return validate({**record, **known})


def validate(record: Mapping[str, Any]) -> Record:
    """Checks a record against its schema and its arithmetic.

    Args:
        record: the candidate.

    Returns:
        The same record as a plain dict in the schema's key order.

    Raises:
        ValueError: a key is missing, unknown or of the wrong type, a number is not finite, or an
            interval does not hold its value; the message names the key.
    """
    try:
        checked = _adapter().validate_python(dict(record))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "record"
        raise ValueError(f"{key}: {first['msg'].lower()}") from None
    figures = [(f"metrics.{key}", figure) for key, figure in checked["metrics"].items()]
    cells = [(f"matrix.{at}", cell) for at, cell in enumerate(checked["matrix"])]
    for key, figure in [*figures, *cells]:
        if not figure["low"] <= figure["value"] <= figure["high"]:
            raise ValueError(f"{key}: the interval does not hold the value ({figure})")
    return checked


def write_record(record: Mapping[str, Any], path: str | Path) -> Path:
    """Validates a record and writes it atomically.

    Args:
        record: the record; a ``curves`` path inside the record's folder is made relative to it.
        path: the file, usually ``<run folder>/record.json``.

    Returns:
        The path written.

    Raises:
        ValueError: the record is not valid; nothing is written.
        OSError: the folder cannot be written.
    """
    path = Path(path)
    checked = validate(record)
    checked.pop("folder", None)
    if checked["curves"] is not None:
        curves, folder = Path(checked["curves"]), path.parent.resolve()
        if curves.is_absolute() and curves.resolve().is_relative_to(folder):
            checked["curves"] = curves.resolve().relative_to(folder).as_posix()
    text = json.dumps(checked, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    replace_file(path, text.encode())
    return path


def read_record(path: str | Path) -> Record:
    """Reads and validates a record.

    Args:
        path: a record file, or the run folder that holds ``record.json``.

    Returns:
        The record, with ``folder`` set to where it was found.

    Raises:
        UserError: there is no such file, it is not JSON, or it is not a record.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "record.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the record ({error.strerror}); name a run folder or its file."
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not a JSON record ({error}); run the recipe again.") from None
    if not isinstance(raw, dict):
        raise UserError(
            f"{path}: not a record but a JSON {type(raw).__name__}; name a record.json."
        )
    try:
        record = validate(raw)
    except ValueError as error:
        raise UserError(f"{path}: not a valid record: {error}; run the recipe again.") from None
    record["folder"] = str(path.parent.resolve())
    return record


@cache
def _adapter() -> TypeAdapter[Record]:
    return TypeAdapter(Record)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a figure")
