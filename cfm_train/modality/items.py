"""Items of a modality and what is said of them, read and checked before torch.

    {"image": "a/1.png", "text": "a red square"}                         a row: item and text
    {"series": [[1, 2], [3, 4]], "text": "it rises"}     the item itself: steps of two channels
    {"image": "1.png", "conversations": [{"from": "human", "value": "<image>\\n…"}, …]}     LLaVA's
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "1.png"},
                                               {"type": "text", "text": "…"}]}, …]}   typed parts
    FOLDER/cat/1.png, or pets.zip/cat/1.png                              a folder for each class

Several items of a row are a list of paths, of objects, or of series that are lists of lists.

A finished row has, besides ``_at``, ``_items`` (references, see `Reader`), ``text`` (what makes the
row: the hashes of its items and its prompt), and either ``prompt`` and ``answer`` or ``turns``, the
messages; ``<image>`` stands where an item goes.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfm_train.data.conversations import ROLES
from cfm_train.data.files import read_file
from cfm_train.data.rows import Row
from cfm_train.data.sources import Checked, fingerprint
from cfm_train.data.splits import cut, make_disjoint, take
from cfm_train.data.tasks import TaskSpec
from cfm_train.errors import UserError

#: Where the item goes in a prompt, whatever it is.
ITEM = "<item>"
#: A reference that is itself the item, as JSON: a table's row, a series.
INLINE = "json:"
#: The modality of which a row without an item is one itself, but for the text that is said of it.
WHOLE = "table"
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


def check_items(section: Mapping[str, Any], modality: str, name: str) -> tuple[Checked, Reader]:
    """Reads every row of all splits, and every item once.

    Args:
        section: the ``data`` section of a run that trains.
        modality: what the items are called.
        name: the run's name, which the task gets.

    Returns:
        The rows, as of any task, and what reads their items.

    Raises:
        UserError: a row cannot be used, or an item is missing.
    """
    beside = Path(section["items"]).expanduser()
    reader = Reader(section["root"], beside if _is_tree(beside) else beside.parent)
    read = {
        split: read_rows(section[key], section, modality, reader) if section[key] else []
        for split, key in (("train", "items"), ("validation", "validation"), ("test", "test"))
    }
    disjoint, leaks = make_disjoint(read)
    for split, draw in (("test", 1), ("validation", 0)):
        if not read[split]:
            disjoint["train"], disjoint[split] = cut(
                disjoint["train"], section[f"{split}_fraction"], draw=draw
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


def read_rows(path: str, section: Mapping[str, Any], modality: str, reader: Reader) -> list[Row]:
    """The rows of a file, a folder or a zip, with the hash of every item.

    Args:
        path: where they are.
        section: ``text`` (the column of what is said) and ``prompt``.
        modality: what the items are called.
        reader: reads the items.

    Raises:
        UserError: as `check_items`.
    """
    source = Path(path).expanduser()
    found: list[Row]
    if _is_tree(source):
        loose = [file for file in _files(source) if file.parent == source]
        if loose:
            _stop(str(loose[0]), f"stands in no folder of {path} that names its class")
        found = [
            {"_items": [str(file.absolute())], "answer": file.parent.name, "_at": str(file)}
            for file in _files(source)
        ]
    elif not str(path).endswith(_ROWS):
        raise UserError(
            f"data.items: {path} is no file of rows ({', '.join(_ROWS[:4])}), folder or zip."
        )
    else:
        found = [
            _row(raw.values, raw.at, section, modality)
            if raw.values is not None
            else _stop(raw.at, raw.problem or "cannot be read")
            for raw in read_file(source, key="data.items", unit="line")
        ]
    if not found:
        raise UserError(f"data.items: {path} holds no items.")
    known: dict[str, str] = {}
    for row in found:
        if "turns" not in row:
            row["prompt"] = _marked(section["prompt"], modality, len(row["_items"]), row["_at"])
        for reference in row["_items"]:
            if reference not in known:
                content = reader.read(reference, row["_at"])
                known[reference] = hashlib.sha256(content).hexdigest()
        row["text"] = [*(known[reference] for reference in row["_items"]), _asked(row)]
    return found


def _asked(row: Row) -> str:
    """What a row's answer answers: with its items it makes the row."""
    if "prompt" in row:
        return str(row["prompt"])
    until = next(i for i, turn in enumerate(row["turns"]) if turn["role"] == "assistant")
    return "\n".join(turn["content"] for turn in row["turns"][:until])


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


def _row(values: Mapping[str, Any], at: str, section: Mapping[str, Any], modality: str) -> Row:
    """One line as a row, without hashes."""
    given = values.get(modality, values.get("item"))
    messages = values.get("messages", values.get("conversations"))
    if given is None and messages is None and modality == WHOLE:
        given = {name: value for name, value in values.items() if name != section["text"]}
    items = [] if given is None else [given] if not _is_list_of_items(given) else list(given)
    if messages is not None:
        turns, more = _turns(messages, at, modality)
        items = [*items, *more]
        held = sum(turn["content"].count(f"<{modality}>") for turn in turns)
        if held == 0 and items:
            first = next(turn for turn in turns if turn["role"] == "user")
            first["content"] = f"<{modality}>" * len(items) + "\n" + first["content"]
        elif held != len(items):
            _stop(at, f"{held} times <{modality}> in the messages, but {len(items)} items")
        return {"_items": [_reference(one, at) for one in items], "turns": turns, "_at": at}
    if not items:
        _stop(at, f"there is no column '{modality}', and no messages")
    said = values.get(section["text"])
    if not isinstance(said, str) or not said.strip():
        _stop(at, f"the column '{section['text']}' must be a text (data.text=COLUMN)")
    return {"_items": [_reference(one, at) for one in items], "answer": said, "_at": at}


def _is_list_of_items(given: Any) -> bool:
    """Several items; a list of numbers, or of lists of numbers, is one: a series."""
    if not isinstance(given, list):
        return False
    return all(
        isinstance(one, str | dict)
        or (isinstance(one, list) and len(one) > 0 and isinstance(one[0], list))
        for one in given
    )


def _reference(item: Any, at: str) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, dict | list):
        return INLINE + json.dumps(item, sort_keys=True, separators=(",", ":"))
    _stop(at, f"an item is a path, or the item itself as a list or an object, found {item!r}")
    raise AssertionError


def _turns(messages: Any, at: str, modality: str) -> tuple[list[dict[str, str]], list[Any]]:
    """Messages with plain texts, and the items of their typed parts in order."""
    if not isinstance(messages, list) or not messages:
        _stop(at, "messages must be a list of {role, content}")
    turns, items = [], []
    for message in messages:
        role = message.get("role", message.get("from")) if isinstance(message, dict) else None
        content = message.get("content", message.get("value")) if role in ROLES else None
        if role not in ROLES:
            _stop(at, f"a message's role is system, user or assistant, found {role!r}")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        text = ""
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                text += str(part["text"])
            elif kind == modality:
                text += f"<{modality}>"
                if (one := part.get(modality, part.get("path", part.get("url")))) is not None:
                    items.append(one)
            else:
                _stop(at, f"a part of a message is a text or of type {modality}, found {kind!r}")
        turns.append({"role": ROLES[str(role)], "content": text})
    roles = [t["role"] for t in turns if t["role"] != "system" or t is not turns[0]]
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)) or not roles:
        _stop(at, "user and assistant must take turns, the user first, after one system message")
    if roles[-1] != "assistant":
        _stop(at, "the last message must be the assistant's")
    if any(f"<{modality}>" in t["content"] for t in turns if t["role"] == "assistant"):
        _stop(at, f"an answer cannot hold <{modality}>: the model writes text")
    return turns, items


def _marked(prompt: str, modality: str, items: int, at: str) -> str:
    """A prompt with one ``<modality>`` for each item; one that names no place has them in front."""
    marker = f"<{modality}>"
    prompt = prompt.replace(ITEM, marker)
    held = prompt.count(marker)
    if held == 0:
        return marker * items + prompt
    if held == 1:
        return prompt.replace(marker, marker * items)
    if held != items:
        _stop(at, f"the prompt has {held} places for items, and the row {items}")
    return prompt


def _stop(at: str, why: str) -> Any:
    raise UserError(f"{at}: {why}.")
