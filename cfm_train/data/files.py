"""Rows of a local file, one at a time, each with its line: JSONL, JSON, CSV, TSV, Parquet, text,
Markdown (as text).

A CSV file may also have semicolons, tabs or bars between its cells, as spreadsheets write it where
the comma is for decimals: its header tells.

Nothing is judged here but the form: a row that cannot be read comes out with its ``problem`` and
the reader goes on, so that the caller decides whether a bad row stops the run.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cfm_train.errors import UserError

#: What may stand between the cells of a CSV file, besides the comma.
OTHER_DELIMITERS = ";\t|"

#: Endings that are understood, each also with ``.gz`` behind it (Parquet compresses by itself).
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")


@dataclass(frozen=True)
class Raw:
    """One row as it stands in its file.

    Attributes:
        at: where, as ``file:line`` (the row's number for formats without lines).
        values: column -> value, or None where the row could not be read.
        problem: why it could not be read.
        typed: False where the format knows only text (CSV), so that ``"1"`` may mean 1.
    """

    at: str
    values: dict[str, Any] | None
    problem: str | None = None
    typed: bool = True


def kind_of(path: Path) -> str:
    """The ending that says how a file is read, without ``.gz``.

    Raises:
        UserError: an ending that is not in ``SUFFIXES``.
    """
    name = path.name.lower().removesuffix(".gz")
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix
    raise UserError(
        f"{path}: cannot tell the format from the name; end it in one of {', '.join(SUFFIXES)} "
        "(each but Parquet also with .gz)."
    )


def read_file(path: Path, *, key: str, unit: str = "line") -> Iterator[Raw]:
    """Reads one file row by row.

    Args:
        path: the file.
        key: the configuration key that named it, for the error sentence.
        unit: what a row of a ``.txt`` or ``.md`` file is: ``line``, ``paragraph`` (by blank lines),
            ``file``.

    Yields:
        The rows in file order; blank lines are passed over.

    Raises:
        UserError: the file is missing, is a folder, is not readable or is damaged as a whole.
    """
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "there is no such file"
        raise UserError(f"{key}: {path}: {what}.{_sibling(path)}")
    kind = kind_of(path)
    try:
        if kind == ".parquet":
            yield from _parquet(path)
            return
        with _open(path) as stream:
            if kind in (".jsonl", ".ndjson"):
                yield from _json_lines(path, stream)
            elif kind == ".json":
                yield from _json_array(path, stream)
            elif kind in (".txt", ".md"):
                yield from _text(path, stream, unit)
            else:
                yield from _table(path, stream, "\t" if kind == ".tsv" else None)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(
            f"{key}: {path}: the gzip file is damaged ({error}); copy it again."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{key}: {path}: is not UTF-8 text ({error.reason}); convert it first."
        ) from error
    except OSError as error:
        raise UserError(f"{key}: {path}: cannot be read ({error.strerror or error}).") from error


def _sibling(path: Path) -> str:
    """ " Did you mean '…'?" with a file of nearly that name beside it."""
    import difflib

    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist either."
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f" Did you mean '{path.parent / close[0]}'?" if close else ""


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked where it starts as gzip does."""
    stream = path.open("rb")
    magic = stream.read(2)
    stream.seek(0)
    return gzip.GzipFile(fileobj=stream) if magic == b"\x1f\x8b" else stream  # type: ignore[return-value]


def _json_lines(path: Path, stream: IO[bytes]) -> Iterator[Raw]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        at = f"{path}:{number}"
        try:
            value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            yield Raw(at, None, "the line is not UTF-8 text")
        except json.JSONDecodeError as error:
            yield Raw(at, None, f"broken JSON ({_json_fault(error)})")
        except RecursionError:
            yield Raw(at, None, "broken JSON (nested too deeply)")
        else:
            yield _row(at, value)


def _json_fault(error: json.JSONDecodeError) -> str:
    """What is wrong and where; some of Python's own messages end in "at" already."""
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def _row(at: str, value: Any) -> Raw:
    if isinstance(value, dict):
        return Raw(at, value)
    return Raw(at, None, f"a row must be a JSON object like {{…}}, found {type_name(value)}")


def _json_array(path: Path, stream: IO[bytes]) -> Iterator[Raw]:
    text = stream.read().decode("utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: broken JSON ({_json_fault(error)}); a .json "
            "file holds one array of objects (name it .jsonl if each line is an object)."
        ) from error
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: a .json file must hold one array of objects, found {type_name(rows)}."
        )
    for number, value in enumerate(rows, start=1):
        yield _row(f"{path}:{number}", value)


def _delimiter(path: Path, header: str) -> str:
    """What stands between the cells: the comma, unless the header has none and one of the others.

    A header is short and seldom has quotes, so it tells more surely than statistics over texts
    full of punctuation.

    Raises:
        UserError: several of the others could be meant.
    """
    if len(next(csv.reader([header]), [])) > 1:
        return ","
    others = [c for c in OTHER_DELIMITERS if len(next(csv.reader([header], delimiter=c), [])) > 1]
    if len(others) > 1:
        raise UserError(
            f"{path}: its header has no comma, but {' and '.join(map(repr, others))}, so what "
            "stands between the cells cannot be told: save it with commas, or as .tsv or .jsonl."
        )
    return others[0] if others else ","


def _table(path: Path, stream: IO[bytes], delimiter: str | None) -> Iterator[Raw]:
    """Rows of a table; without a delimiter its header tells which."""
    # A quoted cell may hold line breaks, so the csv reader must see the text with them.
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        csv.field_size_limit(2**31 - 1)
        header = text.readline()
        if delimiter is None:
            delimiter = _delimiter(path, header)
        lines = itertools.chain([header], text)
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        start = reader.line_num
        while True:
            try:
                start = reader.line_num + 1
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Raw(f"{path}:{start}", None, f"broken CSV ({error})", typed=False)
                continue
            # The header is read with the first row, and counts as a line of its own.
            at = f"{path}:{max(start, 2)}"
            if None in values:
                yield Raw(at, None, "more cells than the header names", typed=False)
            elif None in values.values():
                yield Raw(at, None, "fewer cells than the header names", typed=False)
            else:
                yield Raw(at, values, typed=False)


def _parquet(path: Path) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Raw(f"{path}:{number}", values)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: is not a readable Parquet file ({error}).") from error


def _text(path: Path, stream: IO[bytes], unit: str) -> Iterator[Raw]:
    lines = stream.read().decode("utf-8-sig").splitlines()
    if unit == "file":
        yield Raw(f"{path}:1", {"text": "\n".join(lines)})
        return
    start, held = 1, list[str]()
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip():
            start = start if held else number
            held.append(line)
        if held and (unit == "line" or not line.strip()):
            yield Raw(f"{path}:{start}", {"text": "\n".join(held)})
            held = []


def type_name(value: Any) -> str:
    """The name of a value's type in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")
