"""The library: a folder of artifacts by name and version, written by many and never half-written.

    <library>/<name>/<version>/…          the artifact; `brick.json` in it is the commit
    <library>/<name>/refs.jsonl           append-only: which version is newest, when, from which run
    <library>/stats/<version>/<hash>/…    sidecars, see `sidecar.py`

Nothing here imports torch, and nothing changes an artifact once it is there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO

from cfm_train.errors import UserError, nearest
from cfm_train.library import gate, lineage, model_card, upkeep
from cfm_train.library.card import CARD_FILE, RESERVED, Card, check_file_name, check_name
from cfm_train.library.identity import version_of
from cfm_train.library.sidecar import Sidecar
from cfm_train.library.storage import Content, explained, open_storage, opened
from cfm_train.paths import cache_dir

REFS_FILE = "refs.jsonl"

#: What must be free where an artifact is to be stored.
FREE_BYTES = 16 * 2**20


class Library:
    """A library at a path or an fsspec address.

    Args:
        root: a folder, or an address such as ``s3://bucket/library``; it need not exist yet.
    """

    def __init__(self, root: str | Path) -> None:
        self.storage = open_storage(root)
        self.root = self.storage.url

    def exists(self) -> bool:
        """Whether anything was ever stored here."""
        with explained(self.root, "looking for it"):
            return self.storage.exists("")

    def check_writable(self) -> None:
        """Checks, without leaving a trace, that an artifact could be stored.

        Raises:
            UserError: the folder (or the nearest one above it) may not be written, or is full.
        """
        with explained(self.root, "looking whether it can be written"):
            self.storage.check_writable(FREE_BYTES)

    # -- writing ---------------------------------------------------------------------------------

    def add(self, files: Mapping[str, Content], card: Card) -> Card:
        """Stores an artifact, whole or not at all.

        The same tensors with the same interface are the same version: storing them again makes that
        version the newest of its name and changes nothing else.

        Args:
            files: what to write under each name; tensors as safetensors only.
            card: the card; its version, files and (when empty) creation time are filled in here.

        Returns:
            The card as it lies in the library.

        Raises:
            UserError: a name, a file or a tensor is not allowed, or the library cannot be written.
        """
        check_name(card.name)
        files = {
            name: files[name] for name in sorted(files) if name not in (CARD_FILE, model_card.FILE)
        }
        for name in files:
            gate.check_file(name, f"'{card.name}'")
        card = dataclasses.replace(
            card, version=version_of(files, card), created=card.created or now(), home=None
        )
        card.check(f"The card of '{card.name}'")
        files[model_card.FILE] = model_card.write(card, list(files)).encode()
        card.files = {name: _hash(content) for name, content in files.items()}
        with explained(self.root, f"storing {card.ref}"):
            return self._commit({**files, CARD_FILE: card.to_json().encode()}, card)

    def _commit(self, files: Mapping[str, Content], card: Card) -> Card:
        folder = f"{card.name}/{card.version}"
        # The line is written before the folder appears: a line without a folder means nothing, and
        # where the disk is full this stops here and has changed nothing.
        announce = partial(self._announce, card)
        if self.storage.exists(f"{folder}/{CARD_FILE}"):
            try:
                stored = self.stored(card.name, card.version)
                gate.check_files(stored, f"{self.root}/{folder}", self.opener(stored))
            except UserError:  # damaged since it was written: what is added now repairs it
                with suppress(FileNotFoundError):
                    self.storage.remove(folder)
            else:
                announce()
                return stored
        self.storage.commit(folder, files, CARD_FILE, announce)
        return self.stored(card.name, card.version)

    def _announce(self, card: Card) -> None:
        line = json.dumps({"version": card.version, "at": now(), "run": card.run}).encode()
        self.storage.append(
            f"{card.name}/{REFS_FILE}",
            line,
            unless_last_has=f'"version": "{card.version}"'.encode(),
        )

    # -- reading ---------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Names that have at least one version."""
        with explained(self.root, "listing it"):
            found = self.storage.entries("")
            return [name for name in found if _is_name(name) and self._versions(name)]

    def versions(self, name: str) -> list[str]:
        """Versions of a name, oldest first: the last one is what the bare name means."""
        check_name(name)
        with explained(self.root, f"listing '{name}'"):
            return self._versions(name)

    def find(self, ref: str) -> Card:
        """The card behind a reference.

        Args:
            ref: ``name`` (its newest version), ``name@prefix`` of a version, or the path of an
                artifact's folder.

        Raises:
            UserError: there is no such artifact, or more than one version begins with the prefix.
        """
        if "/" in ref and (Path(ref) / CARD_FILE).is_file():
            text = (Path(ref) / CARD_FILE).read_bytes()
            return dataclasses.replace(Card.from_json(text, f"{ref}/{CARD_FILE}"), home=Path(ref))
        name, version = self.locate(ref)
        with explained(self.root, f"reading '{ref}'"):
            return self.stored(name, version)

    def locate(self, ref: str) -> tuple[str, str]:
        """Name and full version behind ``name`` or ``name@prefix``, without reading the card.

        Raises:
            UserError: there is no such artifact, or more than one version begins with the prefix.
        """
        name, at, prefix = ref.partition("@")
        versions = self.versions(name)
        if not versions:
            raise UserError(
                f"There is no '{name}' in the library {self.root}.{nearest(name, self.names())}"
            )
        if at and (not prefix or not set(prefix) <= set("0123456789abcdef")):
            raise UserError(
                f"'{ref}': after '@' comes the beginning of a version (digits and a to f)."
            )
        matching = [version for version in versions if version.startswith(prefix)]
        if not matching:
            raise UserError(
                f"No version of '{name}' begins with '{prefix}'.{nearest(prefix, versions)}"
            )
        if at and len(matching) > 1:
            raise UserError(
                f"'{ref}' is ambiguous: {' and '.join(matching)} begin with it; write more digits."
            )
        return name, matching[-1]

    def cards(self) -> Iterator[Card]:
        """Every artifact of the library, by name, oldest version first."""
        for name in self.names():
            for version in self.versions(name):
                with explained(self.root, f"reading '{name}@{version}'"):
                    yield self.stored(name, version)

    def folder(self, card: Card) -> Path:
        """The local folder that holds an artifact's files.

        A library elsewhere is copied from once: into the cache, and checked against the card.

        Raises:
            UserError: the copy is not what the card says, or could not be made.
        """
        if card.home is not None:
            return card.home
        path = f"{card.name}/{card.version}"
        local = self.storage.local(path)
        if local is not None:
            return local
        # By the card too: a library may be deleted and made again at the same address.
        key = hashlib.sha256(f"{self.root}\n{card.to_json()}".encode()).hexdigest()
        cache = cache_dir() / "library" / key[:16]
        copies = open_storage(cache)
        with explained(self.root, f"fetching {card.ref}"):
            if not copies.exists(f"{path}/{CARD_FILE}"):
                gate.check_files(card, f"{self.root}/{path}", self.opener(card))
                files: dict[str, Content] = {
                    name: partial(self.storage.open, f"{path}/{name}")
                    for name in [*card.files, CARD_FILE]
                }
                copies.commit(path, files, CARD_FILE, announce=lambda: None)
        return cache / path

    def size(self, card: Card, name: str | None = None) -> int:
        """Bytes of an artifact, or of one of its files; what is missing counts nothing."""
        total = 0
        for file in card.files if name is None else [name]:
            with suppress(FileNotFoundError):
                path = f"{card.name}/{card.version}/{file}"
                home = card.home
                total += (home / file).stat().st_size if home else self.storage.size(path)
        return total

    def opener(self, card: Card) -> Callable[[str], IO[bytes]]:
        """A function that opens a file of an artifact by its name, wherever the library lies."""
        home = card.home
        if home is not None:
            return lambda name: (home / check_file_name(name)).open("rb")
        return lambda name: self.storage.open(f"{card.name}/{card.version}/{check_file_name(name)}")

    # -- upkeep ----------------------------------------------------------------------------------

    def verify(self, ref: str | None = None) -> list[upkeep.Problem]:
        """Hashes everything again and reports what is not as it was (see `upkeep.verify`)."""
        return upkeep.verify(self, ref)

    def remove(self, ref: str, *, force: bool = False) -> str:
        """Deletes one version (see `upkeep.remove`)."""
        return upkeep.remove(self, ref, force=force)

    def gc(self, *, dry_run: bool = False, grace: float = upkeep.GRACE) -> list[str]:
        """Deletes what killed runs left behind (see `upkeep.collect`)."""
        return upkeep.collect(self, dry_run=dry_run, grace=grace)

    def lineage(self, ref: str) -> lineage.Node:
        """What an artifact was made from, back to the bricks that were trained."""
        return lineage.trace(self, ref)

    def sidecar(self, card: Card, data_hash: str) -> Sidecar:
        """Figures about an artifact on some data, to read and to write (see `Sidecar`)."""
        return Sidecar(self, card, data_hash)

    # -- inside ----------------------------------------------------------------------------------

    def stored(self, name: str, version: str) -> Card:
        """The card of exactly this version, without any search."""
        path = f"{name}/{version}/{CARD_FILE}"
        return Card.from_json(self.storage.read(path), f"{self.root}/{path}")

    def _versions(self, name: str) -> list[str]:
        committed = [
            version
            for version in self.storage.entries(name)
            if self.storage.exists(f"{name}/{version}/{CARD_FILE}")
        ]
        if len(committed) < 2:
            return committed
        # The file's order decides, not the clocks of those who wrote to it.
        place: dict[str, tuple[str, int]] = {}
        latest = ""
        for index, line in enumerate(self._refs(name)):
            latest = max(latest, line["at"])
            place[line["version"]] = (latest, index)
        for version in committed:
            if version not in place:
                place[version] = (self.stored(name, version).created, -1)
        return sorted(committed, key=lambda version: place[version])

    def _refs(self, name: str) -> Iterator[dict[str, str]]:
        """The lines of refs.jsonl; a torn one (full disk, power cut) is passed over."""
        for text in self.storage.lines(f"{name}/{REFS_FILE}"):
            try:
                line = json.loads(text)
                yield {"version": str(line["version"]), "at": str(line["at"])}
            except (ValueError, KeyError, TypeError):
                continue


def now() -> str:
    """The time in UTC, ISO 8601 with microseconds: these strings sort as the times do."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _hash(content: Content) -> str:
    with opened(content) as file:
        return gate.hash_of(file)


def _is_name(name: str) -> bool:
    return not name.startswith(".") and name not in RESERVED
