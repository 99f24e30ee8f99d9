"""Looking after a library: verify what lies there, remove a version, collect litter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cfm_train.errors import UserError
from cfm_train.library import gate
from cfm_train.library.card import CARD_FILE, RESERVED, STITCH, Card
from cfm_train.library.identity import version_of
from cfm_train.library.lineage import children
from cfm_train.library.sidecar import STATS
from cfm_train.library.storage import Content, explained

if TYPE_CHECKING:
    from cfm_train.library.store import Library

#: Seconds for which a folder that nobody seems to hold is still left alone.
GRACE = 3600.0

_VERSION = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True)
class Problem:
    """What `verify` found wrong.

    Attributes:
        ref: the artifact, ``name@version``.
        sentence: what is wrong and what to do.
    """

    ref: str
    sentence: str


def verify(library: Library, ref: str | None = None) -> list[Problem]:
    """Checks artifacts against their cards: every file's hash, every tensor, the version itself.

    Args:
        library: the library.
        ref: one artifact, or None for all of them.

    Returns:
        What is wrong, empty if all is as it was written.

    Raises:
        UserError: ``ref`` names no artifact.
    """
    if ref is not None:
        return _problems(library, library.find(ref))
    found = []
    for name in library.names():
        for version in library.versions(name):
            try:
                card = library.stored(name, version)
            except UserError as error:
                found.append(Problem(f"{name}@{version}", str(error)))
                continue
            if (card.name, card.version) != (name, version):
                place = f"{library.root}/{name}/{version}"
                sentence = f"The folder {place} holds the card of {card.ref}: move it back."
                found.append(Problem(f"{name}@{version}", sentence))
                continue
            found += _problems(library, card)
    return found


def _problems(library: Library, card: Card) -> list[Problem]:
    place = f"{library.root}/{card.name}/{card.version}" if card.home is None else str(card.home)
    opener = library.opener(card)
    try:
        with explained(library.root, f"verifying {card.ref}"):
            gate.check_files(card, place, opener)
            files: dict[str, Content] = {name: partial(opener, name) for name in card.files}
            version = version_of(files, card)
    except UserError as error:
        return [Problem(card.ref, str(error))]
    if version != card.version:
        sentence = (
            f"The tensors and the interface of {card.ref} give version {version}: its card was "
            "edited; add or train it again."
        )
        return [Problem(card.ref, sentence)]
    if card.kind == STITCH:
        for parent in card.parents:
            if parent["version"] not in library.versions(parent["name"]):
                sentence = (
                    f"{card.ref} is a stitch and cannot be opened: its brick {parent['name']}@"
                    f"{parent['version']} is no longer in the library; add or train it again."
                )
                return [Problem(card.ref, sentence)]
    if card.home is None:
        present = set(library.storage.entries(f"{card.name}/{card.version}"))
        extra = sorted(present - set(card.files) - {CARD_FILE})
        if extra:
            return [
                Problem(
                    card.ref,
                    f"{place} holds '{extra[0]}', which the card does not name: delete it.",
                )
            ]
    return []


def remove(library: Library, ref: str, *, force: bool = False) -> str:
    """Deletes one version of an artifact, damaged or not.

    Args:
        library: the library.
        ref: ``name@prefix``, or a bare name that has only one version.
        force: delete it even if others were made from it.

    Returns:
        What was deleted, ``name@version``.

    Raises:
        UserError: it does not exist, has several versions and none was chosen, or is a parent.
    """
    name, version = library.locate(ref)
    versions = library.versions(name)
    if "@" not in ref and len(versions) > 1:
        raise UserError(
            f"'{ref}' has {len(versions)} versions ({', '.join(versions)}): write which one, "
            f"as in {name}@{version}."
        )
    made_from_it = [] if force else children(library, name, version)
    if made_from_it:
        others = ", ".join(other.ref for other in made_from_it)
        stitches = stitched_from(library, name, version)
        lost = f" (without it {', '.join(stitches)} can never be opened again)" if stitches else ""
        raise UserError(
            f"{name}@{version} is a parent of {others}: remove them first, or use --force{lost}."
        )
    with explained(library.root, f"removing {name}@{version}"):
        library.storage.remove(f"{name}/{version}")
    return f"{name}@{version}"


def stitched_from(library: Library, name: str, version: str) -> list[str]:
    """References of the stitches that cannot be opened without a version."""
    return [card.ref for card in children(library, name, version) if card.kind == STITCH]


def collect(library: Library, *, dry_run: bool = False, grace: float = GRACE) -> list[str]:
    """Deletes litter: what killed writers left, folders without a card, sidecars of what is gone.

    Args:
        library: the library.
        dry_run: only say what would go.
        grace: seconds for which a folder that nobody seems to hold is left alone.

    Returns:
        The paths, relative to the library.
    """
    gone = []
    with explained(library.root, "collecting litter"):
        for path in list(_litter(library)):
            try:
                if library.storage.age(path) < grace:
                    continue
                if not dry_run:
                    library.storage.remove(path)
            except FileNotFoundError:  # its writer, or another gc, was faster
                continue
            gone.append(path)
    return gone


def _litter(library: Library) -> Iterator[str]:
    storage = library.storage
    yield from storage.litter()
    alive = set()
    for name in storage.entries(""):
        if name.startswith(".") or name in RESERVED:
            continue
        for version in storage.entries(name):
            if storage.exists(f"{name}/{version}/{CARD_FILE}"):
                alive.add(version)
            elif _VERSION.fullmatch(version):
                yield f"{name}/{version}"
    for version in storage.entries(STATS):
        if version not in alive:
            yield f"{STATS}/{version}"
