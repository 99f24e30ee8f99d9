"""Items of a modality and what is said of them, read and checked before torch.

    items.jsonl                                  rows, see `forms`
    FOLDER/cat/1.png, or pets.zip/cat/1.png      a folder for each class

A finished row has, besides ``_at``, ``_items`` (references, see `Reader`) and ``_kinds`` (their
modalities), ``text`` (what makes the row: the hashes of its items and its prompt), and either
``prompt`` and ``answer`` or ``turns``, the messages; ``<image>`` stands where an item goes.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cfm_train.data.files import read_file
from cfm_train.data.rows import Row
from cfm_train.data.sources import Checked, fingerprint
from cfm_train.data.splits import cut, make_disjoint, take
from cfm_train.data.tasks import TaskSpec
from cfm_train.errors import UserError
from cfm_train.modality.forms import INLINE, marked, rows_of, stop

#: Refuses an item: its modality, its bytes, where it is named.
Look = Callable[[str, bytes, str], None]

_ROWS = (".jsonl", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz")


class Reader:
    """Reads items by reference: a path, ``archive.zip/inner/path``, or JSON behind ``json:``.

    Args:
        root: the folder or zip that relative references start from; None for ``beside``.
        beside: the folder of the rows' file.
    """

    def __init__(self, root: str | None, beside: Path) -> None:
        self.base = beside if root is None else Path(root).expanduser()
        if root is not None and not self.base.exists():
            raise UserError(f"data.root: there is no folder or zip {self.base}.")
        self._open: dict[Path, zipfile.ZipFile] = {}

    def read(self, reference: str, at: str) -> bytes:
        """The bytes of an item.

        Args:
            reference: see the class.
            at: where it is named, for the error sentence.

        Raises:
            UserError: there is no such item.
        """
        if reference.startswith(INLINE):
            return reference.removeprefix(INLINE).encode()
        archive, inner = split_zip(self.base / Path(reference).expanduser())
        try:
            return archive.read_bytes() if inner is None else self._zip(archive).read(inner)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            why = f" ({error})" if isinstance(error, zipfile.BadZipFile) else ""
            raise UserError(
                f"{at}: there is no item {reference}{why}; paths start at {self.base}, or at "
                "data.root=FOLDER_OR_ZIP."
            ) from None

    def _zip(self, archive: Path) -> zipfile.ZipFile:
        if archive not in self._open:
            self._open[archive] = zipfile.ZipFile(archive)
        return self._open[archive]


def split_zip(path: Path) -> tuple[Path, str | None]:
    """A path through a zip as the archive and the path in it; None in it for a plain file."""
    for parent in path.parents:
        if parent.suffix == ".zip" and parent.is_file():
            return parent, path.relative_to(parent).as_posix()
    return path, None


def check_items(
    section: Mapping[str, Any], modality: str, name: str, look: Look | None = None
) -> tuple[Checked, Reader]:
    """Reads every row of all splits, and every item once.

    Args:
        section: the ``data`` section of a run that trains.
        modality: what the items are called.
        name: the run's name, which the task gets.
        look: see `read_rows`.

    Returns:
        The rows, as of any task, and what reads their items.

    Raises:
        UserError: a row cannot be used, or an item is missing.
    """
    beside = Path(section["items"]).expanduser()
    reader = Reader(section["root"], beside if _is_tree(beside) else beside.parent)
    read = {
        split: read_rows(section[key], section, [modality], reader, look) if section[key] else []
        for split, key in (("train", "items"), ("validation", "validation"), ("test", "test"))
    }
    disjoint, leaks = make_disjoint(read)
    for split, draw in (("test", 1), ("validation", 0)):
        if not read[split]:
            disjoint["train"], disjoint[split] = _cut(
                disjoint["train"], section[f"{split}_fraction"], draw
            )
    disjoint["train"] = take(disjoint["train"], section["limit"])
    if not disjoint["train"]:
        raise UserError(
            f"data.items: {section['items']} holds no row that the other splits do not hold too."
        )
    return (
        Checked(
            spec=TaskSpec(name, "instruct", None, "loss", False, ()),
            section=dict(section),
            rows=disjoint,
            fingerprints={split: fingerprint(rows) for split, rows in disjoint.items() if rows},
            skipped={},
            reasons=[],
            leaks=leaks,
        ),
        reader,
    )


def _cut(rows: list[Row], fraction: float, draw: int) -> tuple[list[Row], list[Row]]:
    """Cuts a share of the rows out; questions about the same items stay on one side.

    Else the answers to other questions about an item that was trained on would be tested. Where
    all rows are about the same items, questions are what is cut.
    """
    asked = [hashes(row) if "turns" in row else row["text"] for row in rows]
    if len(set(map(tuple, asked))) < 2:
        asked = [row["text"] for row in rows]
    keys: list[Row] = [{"text": key, "row": row} for key, row in zip(asked, rows, strict=True)]
    kept, taken = cut(keys, fraction, draw=draw)
    return [one["row"] for one in kept], [one["row"] for one in taken]


def read_rows(
    path: str,
    section: Mapping[str, Any],
    modalities: Sequence[str],
    reader: Reader,
    look: Look | None = None,
) -> list[Row]:
    """The rows of a file, a folder or a zip, with the hash of every item.

    Args:
        path: where they are.
        section: ``text`` (the column of what is said) and ``prompt``.
        modalities: what the items of the run are called; files in folders are of the first.
        reader: reads the items.
        look: called with each item's modality, its bytes and where it is named; refuses what its
            encoder cannot read.

    Raises:
        UserError: as `check_items`.
    """
    source = Path(path).expanduser()
    found: list[Row]
    if _is_tree(source):
        loose = [file for file in _files(source) if file.parent == source]
        if loose:
            stop(str(loose[0]), f"stands in no folder of {path} that names its class")
        found = [
            {
                "_items": [str(file.absolute())],
                "_kinds": [modalities[0]],
                "answer": file.parent.name,
                "_at": str(file),
            }
            for file in _files(source)
        ]
    elif not str(path).endswith(_ROWS):
        raise UserError(
            f"data.items: {path} is no file of rows ({', '.join(_ROWS[:4])}), folder or zip."
        )
    else:
        found = []
        for raw in read_file(source, key="data.items", unit="line"):
            if raw.values is None:
                stop(raw.at, raw.problem or "cannot be read")
            else:
                found += rows_of(raw.values, raw.at, section, modalities)
    if not found:
        raise UserError(f"data.items: {path} holds no items.")
    known: dict[str, str] = {}
    for row in found:
        if "turns" not in row:
            row["prompt"] = marked(section["prompt"], row["_kinds"], modalities, row["_at"])
        for reference, kind in zip(row["_items"], row["_kinds"], strict=True):
            if reference not in known:
                content = reader.read(reference, row["_at"])
                if look is not None:
                    look(kind, content, row["_at"])
                known[reference] = hashlib.sha256(content).hexdigest()
        row["text"] = [*(known[reference] for reference in row["_items"]), _asked(row)]
    return found


def _asked(row: Row) -> str:
    """What a row's answer answers: with its items it makes the row."""
    if "prompt" in row:
        return str(row["prompt"])
    until = next(i for i, turn in enumerate(row["turns"]) if turn["role"] == "assistant")
    return "\n".join(turn["content"] for turn in row["turns"][:until])


def answer_of(row: Row) -> str:
    """What is said in a row: its text, or the last message."""
    return str(row["turns"][-1]["content"] if "turns" in row else row["answer"])


def hashes(row: Row) -> list[str]:
    """The hashes of a row's items."""
    return list(row["text"][: len(row["_items"])])


def _is_tree(path: Path) -> bool:
    _, inner = split_zip(path / "x")
    return path.is_dir() or inner is not None


def _files(source: Path) -> list[Path]:
    """The files below a folder or a zip, sorted, hidden ones left out."""
    archive, inner = split_zip(source / "x")
    if inner is None:
        names = [path for path in source.rglob("*") if path.is_file()]
    else:
        below = Path(inner).parent.as_posix()
        prefix = "" if below == "." else f"{below}/"
        with zipfile.ZipFile(archive) as opened:
            inside = [one.filename for one in opened.infolist() if not one.is_dir()]
        names = [archive / name for name in inside if name.startswith(prefix)]
    return sorted(path for path in names if not path.name.startswith((".", "_")))
