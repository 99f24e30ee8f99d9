"""What the rows of a comparison were made from: a graph of bricks and configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cfm_train.configuration.expression import BrickRef, Call, Expression
from cfm_train.configuration.parser import parse
from cfm_train.configuration.variants import MADE, short
from cfm_train.errors import UserError
from cfm_train.library.card import Card

if TYPE_CHECKING:
    from cfm_train.operations.compared import Compared

Json = dict[str, Any]


def ancestry(compared: Compared) -> Json:
    """Everything that the rows shown were made from, with the configurations in between.

    Args:
        compared: the rows.

    Returns:
        ``nodes`` (bricks by reference, configurations by the start of their digest) and ``edges``
        from what went in to what came out, each with its weight or ``None``.
    """
    selection, nodes, edges = compared.inputs.selection, dict[str, Json](), dict[Any, Any]()

    def add(tree: Expression) -> str:
        if isinstance(tree, BrickRef):
            return add_card(compared.library.find(str(tree)))
        key = tree.digest()[:12]
        if key not in nodes:
            nodes[key] = {"id": key, "name": short(tree), "version": key, "path": None}
            nodes[key] |= {"kind": "configuration", "operation": tree.fn, "data": {}}
            connect(tree, key)
        return key

    def add_card(card: Card) -> str:
        if card.ref not in nodes:
            nodes[card.ref] = {"id": card.ref, "kind": "brick", **part(compared, card)}
            if card.operation in MADE and card.expression:
                try:
                    connect(parse(card.expression), card.ref)
                except UserError:  # its bricks are gone: their names are all there is
                    for parent in card.parents:
                        edges[f"{parent['name']}@{parent['version']}", card.ref] = None
        return card.ref

    def connect(tree: Expression, key: str) -> None:
        if isinstance(tree, Call):
            for arg, weight in zip(tree.args, _weights(tree), strict=True):
                edges[add(arg), key] = weight

    shown = {body.label for body in compared.shown()}
    for label, tree in zip(selection.labels, selection.trees, strict=True):
        if label in shown:
            add(tree)
    known = [(a, b, weight) for (a, b), weight in edges.items() if a in nodes]
    return {
        "nodes": list(nodes.values()),
        "edges": [{"a": a, "b": b, "weight": weight} for a, b, weight in known],
    }


def part(compared: Compared, card: Card) -> Json:
    """A brick as the record names it: name, version, folder, and the data it was trained on."""
    return {
        "name": card.name,
        "version": card.version,
        "operation": card.operation,
        "path": str(compared.library.folder(card)),
        "data": _data(card),
    }


def _weights(tree: Call) -> list[float | None]:
    """What each argument of a merge weighs, λ included; the mean of weights over depth."""
    params = dict(tree.params)
    given, scale = params.get("weights"), params.get("scale", 1.0)
    if tree.fn != "merge" or not isinstance(given, tuple) or not isinstance(scale, int | float):
        return [None] * len(tree.args)
    mean: Callable[[Any], float] = lambda w: sum(w) / len(w) if isinstance(w, tuple) else float(w)  # noqa: E731
    return [mean(weight) * scale for weight in given]


def _data(card: Card) -> dict[str, str]:
    """The data that a brick's training read: name -> start of the fingerprint."""
    return {str(each.get("name")): str(each.get("fingerprint"))[:12] for each in card.data}
