"""Checks of a stitch from cards and tensor headers alone, before torch is imported.

What they cannot tell (the width of a slice of a fused module, an adapter from elsewhere whose card
names no sites) is checked again on the bricks themselves, by the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cfm_train.configuration.expression import BrickRef, Expression, bricks
from cfm_train.configuration.opened import stitch_tree, unmergeable
from cfm_train.configuration.pin import with_defaults
from cfm_train.errors import UserError
from cfm_train.library import gate
from cfm_train.library.card import HEADS_FILE, STITCH, Card
from cfm_train.library.peft_format import TENSOR_FILE
from cfm_train.library.store import Library
from cfm_train.library.tensorfile import read_header
from cfm_train.stitching.mode import Mode, mode_of
from cfm_train.stitching.ports import Part, Place, Port, check_parts, places_of, too_wide


def check_trees(
    mode: Mode, trees: Sequence[Expression], labels: Sequence[str], library: Library
) -> list[Part] | None:
    """Refuses configurations that a mode cannot stitch.

    Args:
        mode: the mode.
        trees: the configurations in order, versions pinned.
        labels: how a person wrote each.
        library: where their bricks lie.

    Returns:
        Where each acts; None where some card does not say.

    Raises:
        UserError: naming the bricks and the site, or the module, where they do not fit.
    """
    parts = []
    for label, tree in zip(labels, trees, strict=True):
        places = _places(tree, library)
        if places is None:
            return None
        parts.append(Part(label, places))
    check_parts(mode, parts)
    if mode.square:
        _check_widths(mode, trees, labels, library)
    return parts


def check_tree(tree: Expression, library: Library) -> None:
    """Refuses a configuration of which some part cannot be stitched, or whose heads disagree.

    Args:
        tree: any configuration, versions pinned.
        library: where its bricks lie.

    Raises:
        UserError: see `check_trees`; or two bricks bring different heads for one task.
    """
    _places(tree, library)
    check_heads(tree, library)


def check_heads(tree: Expression, library: Library) -> None:
    """Refuses bricks that bring different heads for one task, as opening them would.

    Raises:
        UserError: naming the bricks and the task.
    """
    found: dict[str, tuple[str, dict[str, Any], dict[str, bytes]]] = {}
    for ref in bricks(tree):
        card = library.find(str(ref))
        if HEADS_FILE not in card.files:
            continue
        tensors = gate.read_tensors(library.folder(card) / HEADS_FILE, "np")
        for task, described in card.heads.items():
            own = {n: t.tobytes() for n, t in tensors.items() if n.startswith(f"{task}.")}
            first, *known = found.setdefault(task, (card.ref, described, own))
            if known != [described, own]:
                raise UserError(
                    f"{first} and {card.ref} bring different heads for '{task}', and one task is "
                    "answered by one head: leave one of the bricks out."
                )


def check_fold(parts: Sequence[Part] | None) -> None:
    """Refuses to fold what is no low-rank update.

    Raises:
        UserError: naming the brick.
    """
    for part in parts or []:
        for place in part.places:
            if place.port != Port.LINEAR:
                raise UserError(
                    f"fold=true makes one LoRA, and '{part.label}' ({place.what}) is no plain "
                    f"low-rank update at '{place.site}': leave fold out."
                )
    if parts and not any(part.places for part in parts):
        raise UserError("fold=true makes one LoRA, and the bricks are heads alone: leave fold out.")


def _places(tree: Expression, library: Library) -> tuple[Place, ...] | None:
    """Where a configuration acts; what is inside of it is checked too."""
    if isinstance(tree, BrickRef):
        card = library.find(str(tree))
        if card.kind == STITCH:
            return _places(stitch_tree(card), library)
        return places_of(card.kind, card.interface.get("hyper"), card.sites)
    if tree.fn == "stitch":
        mode = mode_of(dict(with_defaults(tree).params)["mode"])
        parts = check_trees(mode, tree.args, [str(arg) for arg in tree.args], library)
        found = None if parts is None else [part.places for part in parts]
    else:
        inner = [_places(arg, library) for arg in tree.args]
        for arg, places in zip(tree.args, inner, strict=True):
            other = [place for place in places or () if place.port != Port.LINEAR]
            if other and _is_stitch(arg, library):
                raise UserError(unmergeable(f"'{arg}'", other[0].what))
        found = None if None in inner else [places for places in inner if places is not None]
    return None if found is None else tuple(dict.fromkeys(p for places in found for p in places))


def _is_stitch(tree: Expression, library: Library) -> bool:
    if isinstance(tree, BrickRef):
        return library.find(str(tree)).kind == STITCH
    return tree.fn == "stitch"


def _check_widths(
    mode: Mode, trees: Sequence[Expression], labels: Sequence[str], library: Library
) -> None:
    """Refuses modules where LoRA bricks meet that are not as wide as their input."""
    seen: dict[str, int] = {}
    for number, tree in enumerate(trees):  # by number: a brick may follow itself
        for card in _leaves(tree, library):
            for module, (inner, outer) in _widths(card, library).items():
                met = seen.setdefault(module, number)
                if met != number and inner != outer:
                    raise UserError(
                        too_wide(mode, labels[met], labels[number], module, inner, outer)
                    )


def _leaves(tree: Expression, library: Library) -> list[Card]:
    found = []
    for ref in bricks(tree):
        card = library.find(str(ref))
        found += _leaves(stitch_tree(card), library) if card.kind == STITCH else [card]
    return found


def _widths(card: Card, library: Library) -> dict[str, tuple[int, int]]:
    """Input and output features of each whole module that a LoRA adapts."""
    if card.kind != "lora" or TENSOR_FILE not in card.files:
        return {}
    path = library.folder(card) / TENSOR_FILE
    with path.open("rb") as file:
        tensors = read_header(file, f"{TENSOR_FILE} of {card.ref}")
    sliced = card.interface.get("slices") or {}
    widths = {}
    for name, info in tensors.items():
        stem, found, _ = name.partition(".lora_A.weight")
        other = tensors.get(f"{stem}.lora_B.weight")
        module = stem.removeprefix("base_model.model.")
        if found and other is not None and module not in sliced:
            widths[module] = (info.shape[1], other.shape[0])
    return widths
