"""Sidecars: figures about an artifact on some data, kept beside the artifacts and never in them.

Metrics, Fisher diagonals, Gram matrices, routing prototypes: whatever can be computed again from an
artifact and a data set, and is worth keeping. They do not change the version and go with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfm_train.library import gate
from cfm_train.library.card import Card, check_file_name
from cfm_train.library.storage import Content, explained

if TYPE_CHECKING:
    from cfm_train.library.store import Library

STATS = "stats"


def sidecar_folder(card: Card, data_hash: str) -> str:
    """Where the figures about an artifact on some data lie, relative to the library.

    Args:
        card: the artifact.
        data_hash: fingerprint of the data.

    Raises:
        UserError: the hash has characters that no file name has.
    """
    return f"{STATS}/{card.version}/{check_file_name(data_hash)}"


class Sidecar:
    """The files about one artifact on one data set; see `Library.sidecar`."""

    def __init__(self, library: Library, card: Card, data_hash: str) -> None:
        self.library = library
        self.about = f"the sidecar of {card.ref}"
        self.folder = sidecar_folder(card, data_hash)

    def names(self) -> list[str]:
        """The files that were written."""
        with explained(self.library.root, f"listing {self.about}"):
            return self.library.storage.entries(self.folder)

    def read(self, name: str) -> bytes | None:
        """The content of a file, None where it was never written."""
        gate.check_file(name, self.about)
        with explained(self.library.root, f"reading {name} of {self.about}"):
            try:
                return self.library.storage.read(f"{self.folder}/{name}")
            except FileNotFoundError:
                return None

    def write(self, name: str, content: Content) -> None:
        """Writes a file, new or over an old one; a reader sees the one or the other, whole.

        Raises:
            UserError: the name is not allowed (tensors as safetensors only), or the disk refuses.
        """
        gate.check_file(name, self.about)
        with explained(self.library.root, f"writing {name} of {self.about}"):
            self.library.storage.put(f"{self.folder}/{name}", content)


def find_sidecars(library: Library, card: Card, name: str) -> list[Sidecar]:
    """Every sidecar of an artifact that holds a file of some name, sorted by data hash."""
    folder = f"{STATS}/{card.version}"
    with explained(library.root, f"listing the sidecars of {card.ref}"):
        hashes = sorted(library.storage.entries(folder))
    found = [Sidecar(library, card, one) for one in hashes]
    return [sidecar for sidecar in found if name in sidecar.names()]
