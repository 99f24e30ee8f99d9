"""Pinning: every brick of a tree gets the full version that its name means now."""

from __future__ import annotations

from typing import Protocol

from cfm_train.configuration.expression import BrickRef, Call, Expression
from cfm_train.library.card import Card


class Finder(Protocol):
    """The part of a library that pinning needs."""

    def find(self, ref: str) -> Card:
        """The card behind ``name`` or ``name@prefix``; UserError where there is none."""


def pin(tree: Expression, library: Finder) -> Expression:
    """The same tree with all versions written out.

    Args:
        tree: a tree as it was parsed.
        library: where the bricks lie.

    Returns:
        A tree whose text, JSON and digest mean the same bricks for ever.

    Raises:
        UserError: a brick does not exist, or its version is ambiguous.
    """
    if isinstance(tree, BrickRef):
        card = library.find(str(tree))
        return BrickRef(card.name, card.version)
    return Call(tree.fn, tree.rule, tuple(pin(arg, library) for arg in tree.args), tree.params)
