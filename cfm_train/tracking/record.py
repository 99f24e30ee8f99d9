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
from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic wants this one below Python 3.12

from cfm_train.errors import UserError
from cfm_train.tracking.atomic import replace_file

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@with_config(_STRICT)
class Figure(TypedDict):
    """A metric with its 95 % interval over ``n`` examples."""

    value: float
    low: float
    high: float
    n: int


@with_config(_STRICT)
class Cell(TypedDict):
    """One cell of the brick × task matrix; ``role`` says which kind of row it stands in."""

    brick: str
    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    role: Literal["brick", "merged", "floor", "ceiling"]


@with_config(_STRICT)
class Check(TypedDict):
    """A promise that the run checked: the figure, what it had to stay within, whether it did."""

    value: float | bool | str | None
    tolerance: float | None
    passed: bool


@with_config(_STRICT)
class Parent(TypedDict):
    """A brick that another was made from, with its weight where the operation has one."""

    name: str
    version: str
    weight: NotRequired[float | None]


@with_config(_STRICT)
class Brick(TypedDict):
    """The artifact that the run wrote (``evaluate`` and ``predict``: the one that it read)."""

    name: str
    version: str
    path: str
    parents: list[Parent]


@with_config(_STRICT)
class Backbone(TypedDict):
    """The frozen model under the brick; ``unchanged`` is true when its checksum is what it was."""

    id: str
    fingerprint: str
    unchanged: bool


@with_config(_STRICT)
class Cost(TypedDict):
    """What the run took; a figure that an operation lacks is null (a merge trains nothing)."""

    seconds: float
    train_seconds: float | None
    samples_per_second: float | None
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    trainable_parameters: int | None
    flop_share: float | None


@with_config(_STRICT)
class Leaks(TypedDict):
    """Rows of a task that stood in two splits and were dropped from one; the first few places."""

    total: int
    counts: dict[str, int]
    examples: list[str]


@with_config(_STRICT)
class Data(TypedDict):
    """What reading the data found: leaks by task, skipped rows, a fingerprint for every split."""

    leaks: dict[str, Leaks]
    skipped_rows: int
    fingerprints: dict[str, str]


@with_config(_STRICT)
class Sample(TypedDict):
    """One example as a person reads it."""

    input: str
    prediction: str
    reference: str
    task: NotRequired[str]
    at: NotRequired[str]
    step: NotRequired[int]


@with_config(_STRICT)
class Wandb(TypedDict):
    """Where the run stands in W&B."""

    mode: Literal["offline", "online", "disabled"]
    id: str | None
    project: str | None
    group: str | None
    error: NotRequired[str | None]


@with_config(_STRICT)
class Record(TypedDict):
    """The whole record. ``folder`` is where it was read from; it is never written."""

    operation: str
    recipe: str
    name: str
    status: Literal["done", "failed"]
    seed: int
    brick: Brick | None
    backbone: Backbone | None
    metrics: dict[str, Figure]
    checks: dict[str, Check]
    cost: Cost
    config_hash: str
    versions: dict[str, str]
    inputs: dict[str, str]
    data: Data | None
    matrix: list[Cell]
    samples: list[Sample]
    wandb: Wandb | None
    curves: str | None
    error: NotRequired[str | None]
    folder: NotRequired[str]


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
