"""Where the rows of a task lie: files that are named, a folder of files, or the Hub.

One source per run, in this order: files (``data.train=a.jsonl``), a folder (``data.root=FOLDER``),
the Hub (``data.hub``). The section's own column names hold for files and folders; ``hub_columns``
replaces them for the Hub.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cfm_train.data.files import SUFFIXES, Raw, read_file
from cfm_train.data.hub import read_hub
from cfm_train.errors import UserError, nearest
from cfm_train.paths import PACKAGE

SPLITS = ("train", "validation", "test")


def with_source_columns(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section with the column names of the source that it will be read from."""
    section = dict(section)
    if source(section) == "hub":
        section.update(section["hub_columns"] or {})
    else:
        section["hub_labels"] = None
    return section


def source(section: Mapping[str, Any]) -> str:
    """Which of ``files``, ``root`` and ``hub`` the rows come from.

    Raises:
        UserError: the section names none of them.
    """
    if any(section[split] for split in SPLITS):
        return "files"
    for kind in ("root", "hub"):
        if section[kind]:
            return kind
    raise UserError(
        "data.train is not set; name a file (data.train=rows.jsonl), a folder that holds "
        f"{section['name']}.train.jsonl (data.root=FOLDER) or a Hub data set (data.hub=OWNER/NAME)."
    )


def local(path: str) -> Path:
    """A file or folder as it is named; ``package:quickstart/…`` is one that the project ships."""
    if path.startswith("package:"):
        return PACKAGE / "data" / path.removeprefix("package:")
    return Path(path).expanduser()


def location(section: Mapping[str, Any], split: str) -> tuple[str, Path] | None:
    """The key and the file of a split that lies on this machine, or None where there is none.

    Raises:
        UserError: the folder is missing, or holds no training rows of this task.
    """
    kind = source(section)
    if kind == "files":
        name = section[split]
        return (f"data.{split}", local(name)) if name else None
    if kind == "hub":
        return None
    folder = local(section["root"])
    if not folder.is_dir():
        raise UserError(f"data.root: there is no folder {folder}.")
    for suffix in (s + gz for s in SUFFIXES for gz in ("", ".gz")):
        path = folder / f"{section['name']}.{split}{suffix}"
        if path.is_file():
            return "data.root", path
    if split == "train":
        tasks = {p.name.split(".train.")[0] for p in folder.iterdir() if ".train." in p.name}
        raise UserError(
            f"data.root: {folder} holds no {section['name']}.train.jsonl."
            f"{nearest(section['name'], tasks)}"
        )
    return None


def raw_rows(section: Mapping[str, Any], split: str) -> Iterator[Raw]:
    """The rows of one split as they stand in the source; none where it has no such split."""
    if source(section) == "hub":
        return read_hub(section, split)
    place = location(section, split)
    return iter(()) if place is None else read_file(place[1], key=place[0], unit=section["unit"])
