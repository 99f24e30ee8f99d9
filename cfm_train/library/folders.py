"""Plain folders outside of a library: export as a PEFT adapter and take it back; push and pull."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from cfm_train.errors import UserError
from cfm_train.library import gate
from cfm_train.library.card import CARD_FILE, STITCH, Card
from cfm_train.library.identity import version_of
from cfm_train.library.peft_format import CONFIG_FILE, TENSOR_FILE
from cfm_train.library.storage import Content, opened
from cfm_train.library.store import Library

#: The subfolder of an exported adapter for what PEFT does not know.
ASIDE = "cfm_train"


def export(library: Library, card: Card, folder: Path) -> list[str]:
    """Writes an artifact as a PEFT adapter folder.

    What PEFT does not know (the card, heads of cfm_train) lies aside, in the subfolder
    ``cfm_train``.

    Args:
        library: holds the artifact.
        card: the artifact's card.
        folder: the new folder; it must be empty or not exist.

    Returns:
        The names of the files, relative to ``folder``.

    Raises:
        UserError: the artifact is not in PEFT's format or damaged, or the folder holds something.
    """
    if card.kind == STITCH:
        raise UserError(
            f"{card.ref} is a stitch, made from its bricks each time it is opened: export the "
            "bricks, or stitch them again with fold=true, which makes one LoRA of LoRA bricks."
        )
    if not {CONFIG_FILE, TENSOR_FILE} <= set(card.files):
        raise UserError(
            f"{card.ref} is a '{card.kind}' brick, for which PEFT has no format: use it through "
            "cfm_train, or hand it on with push."
        )
    source = library.folder(card)
    gate.check_artifact(card, source)
    files: dict[str, Content] = {f"{ASIDE}/{CARD_FILE}": card.to_json().encode()}
    for name in card.files:
        front = name in (CONFIG_FILE, TENSOR_FILE, "README.md")
        files[name if front else f"{ASIDE}/{name}"] = source / name
    return write_folder(folder, files)


def take_back(folder: Path) -> tuple[Card, dict[str, Content]] | None:
    """The artifact of a folder that `export` wrote, so that it comes back as the version it was.

    Args:
        folder: a PEFT adapter folder.

    Returns:
        The card and the files; None where no card lies aside.

    Raises:
        UserError: the card is damaged, or adapter and heads are not the ones that it was written
            for (retrained, edited): they are another brick than the card says.
    """
    aside = folder / ASIDE
    path = aside / CARD_FILE
    if not path.is_file():
        return None
    card = Card.from_json(path.read_bytes(), str(path))
    files: dict[str, Content] = {}
    for name, expected in card.files.items():
        gate.check_file(name, str(folder))
        if name == "README.md":  # a person's to change; the library writes its own
            continue
        place = folder / name if name in (CONFIG_FILE, TENSOR_FILE) else aside / name
        if not place.is_file():
            raise UserError(f"{place} is missing, which the card of {card.ref} names.")
        with place.open("rb") as file:
            if gate.hash_of(file) != expected:
                raise UserError(f"{place} has changed since {card.ref} was exported.")
        files[name] = place
    version = version_of(files, card)
    if version != card.version:
        raise UserError(f"{path} was edited: its tensors and interface give version {version}.")
    return card, files


def push(library: Library, card: Card, folder: Path) -> list[str]:
    """Writes an artifact, card and all, into a new folder that `pull` reads.

    Args:
        library: holds the artifact.
        card: the artifact's card.
        folder: the new folder; it must be empty or not exist.

    Returns:
        The names of the files.

    Raises:
        UserError: the artifact is damaged, or the folder holds something.
    """
    gate.check_files(card, f"{library.root}/{card.name}/{card.version}", library.opener(card))
    files: dict[str, Content] = {name: partial(library.opener(card), name) for name in card.files}
    return write_folder(folder, {**files, CARD_FILE: card.to_json().encode()})


def pull(library: Library, folder: Path, name: str | None = None) -> Card:
    """Takes the artifact of a folder into the library.

    Args:
        library: where to.
        folder: holds a ``brick.json`` and its files.
        name: the name to give it, its own if None.

    Returns:
        The card as it lies in the library.

    Raises:
        UserError: the folder holds no artifact, or the artifact is not what its card says.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no artifact (no {CARD_FILE}): a PEFT adapter comes in with "
            "`add FOLDER --name NAME`."
        )
    card = Card.from_json(path.read_bytes(), str(path))
    gate.check_artifact(card, folder)
    files: dict[str, Content] = {file: folder / file for file in card.files}
    version = version_of(files, card)
    if version != card.version:
        raise UserError(
            f"{path} says version {card.version}, but its tensors and interface give {version}: "
            "the card was edited; get the artifact again."
        )
    return library.add(files, dataclasses.replace(card, name=name or card.name))


def write_folder(folder: Path, files: Mapping[str, Content]) -> list[str]:
    """Writes a new folder whole or not at all.

    Args:
        folder: the folder; it must be empty or not exist.
        files: content by path, relative to the folder.

    Returns:
        The paths, sorted.

    Raises:
        UserError: the folder holds something, or cannot be written.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not an empty folder: write to a new one.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            new = Path(temporary) / "new"
            for name, content in files.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                with opened(content) as source, (new / name).open("xb") as target:
                    while piece := source.read(1 << 20):
                        target.write(piece)
            os.replace(new, folder)
    except OSError as error:
        raise UserError(f"{folder} could not be written ({error.strerror or error}).") from None
    return sorted(files)
