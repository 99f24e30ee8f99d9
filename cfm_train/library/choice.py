"""What the weights of a merge were chosen on, as its card tells it. No torch.

A merge with found weights keeps in its card's recipe how and on which rows (``recipe.search``). One
that adapted on test inputs says so wherever it is shown, and so does all that is made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cfm_train.library.card import Card


def choice(card: Card) -> str:
    """One phrase on how the weights were found; empty where they were given."""
    search = card.recipe.get("search")
    if not isinstance(search, Mapping) or "chosen_on" not in search:
        return ""
    found = f"weights found by {search['kind']}, chosen on {search['chosen_on']}"
    return f"{found} ({search['note']})" if search.get("note") else found


def note(recipe: Mapping[str, Any]) -> str | None:
    """What has to be said wherever a brick's figures are shown; None for nothing.

    Args:
        recipe: the card's; the recipes of its parents stand in it.
    """
    search, parents = recipe.get("search"), recipe.get("parents")
    if isinstance(search, Mapping) and isinstance(search.get("note"), str):
        return str(search["note"])
    for parent in parents.values() if isinstance(parents, Mapping) else ():
        if isinstance(parent, Mapping) and (found := note(parent)):
            return found
    return None
