"""What a stitch of the library is opened from: its configuration, and the bricks in it. No torch.

A stitch holds no tensors but heads. It is made from its bricks each time it is opened, so they must
be there, with the versions that its configuration names.
"""

from __future__ import annotations

from collections.abc import Iterator

from cfm_train.configuration.expression import Expression, bricks
from cfm_train.configuration.parser import parse
from cfm_train.errors import UserError
from cfm_train.library import gate
from cfm_train.library.card import STITCH, Card
from cfm_train.library.store import Library


def stitch_tree(card: Card) -> Expression:
    """The configuration that a stitch is opened from.

    Raises:
        UserError: the card holds none that can be read.
    """
    expression = card.interface.get("expression")
    if not isinstance(expression, str):
        raise UserError(f"{card.ref} names no configuration to be opened from: make it again.")
    return parse(expression)


def opened_from(card: Card, library: Library) -> Iterator[Card]:
    """The cards of all bricks that opening an artifact reads, its own first.

    Raises:
        UserError: one of them is not in the library, or its files are not what its card says.
    """
    gate.check_artifact(card, library.folder(card))
    yield card
    if card.kind != STITCH:
        return
    for ref in bricks(stitch_tree(card)):
        try:
            inner = library.find(str(ref))
        except UserError as error:
            raise UserError(
                f"{card.ref} is a stitch, made from its bricks each time it is opened, and one is "
                f"missing: {error}"
            ) from None
        yield from opened_from(inner, library)


def unmergeable(label: str, what: str) -> str:
    """Why a stitch of anything but low-rank updates is no part of a merge."""
    return (
        f"{label} ({what}) is no low-rank update and has no parameters of its own, so it cannot be "
        "merged: merge the bricks first and stitch what comes out."
    )
