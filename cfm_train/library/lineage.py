"""Lineage: what an artifact was made from, read from the cards alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cfm_train.errors import UserError
from cfm_train.library.card import Card

if TYPE_CHECKING:
    from cfm_train.library.store import Library


@dataclass(frozen=True)
class Node:
    """One artifact and its parents.

    Attributes:
        name: its name.
        version: its full version.
        card: its card, None where the library no longer holds it.
        parents: what it was made from; empty where `card` is None, and where the same artifact
            stands further up already.
    """

    name: str
    version: str
    card: Card | None
    parents: list[Node] = field(default_factory=list)

    @property
    def ref(self) -> str:
        """The full reference, ``name@version``."""
        return f"{self.name}@{self.version}"

    def walk(self) -> Iterator[Node]:
        """This node and all above it, each as often as it stands in the tree."""
        yield self
        for parent in self.parents:
            yield from parent.walk()

    def to_dict(self) -> dict[str, Any]:
        """The tree as JSON values."""
        return {
            "name": self.name,
            "version": self.version,
            "present": self.card is not None,
            "kind": self.card.kind if self.card else None,
            "operation": self.card.operation if self.card else None,
            "expression": self.card.expression if self.card else None,
            "parents": [parent.to_dict() for parent in self.parents],
        }


def trace(library: Library, ref: str) -> Node:
    """The tree of an artifact's parents.

    Args:
        library: where the parents are looked up.
        ref: the artifact, as `Library.find` takes it.

    Raises:
        UserError: there is no such artifact. A parent that is gone is a node without a card.
    """
    return _node(library, library.find(ref), frozenset())


def _node(library: Library, card: Card, above: frozenset[str]) -> Node:
    # A merge that gives back one of its parents, value for value, has that parent's version: with
    # the same name too it would be its own ancestor.
    if card.ref in above:
        return Node(card.name, card.version, card)
    parents = []
    for parent in card.parents:
        name, version = parent["name"], parent["version"]
        try:
            parents.append(_node(library, library.find(f"{name}@{version}"), above | {card.ref}))
        except UserError:
            parents.append(Node(name, version, None))
    return Node(card.name, card.version, card, parents)


def children(library: Library, name: str, version: str) -> list[Card]:
    """The other artifacts of the library that were made from this one directly.

    Raises:
        UserError: one of their cards cannot be read.
    """
    me = {"name": name, "version": version}
    found = []
    for other in library.names():
        for theirs in library.versions(other):
            if (other, theirs) != (name, version):
                card = library.stored(other, theirs)
                if me in card.parents:
                    found.append(card)
    return found
