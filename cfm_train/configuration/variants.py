"""Configurations beside each other: what they are made of, and how little they differ. No torch.

A merged brick of the library is its configuration here (`opened`), so that it makes no difference
whether a merge was stored under a name or written out. Two families matter when many are compared:

- configurations that differ in λ, density or weights alone are points of curves, and one of them is
  to be chosen on validation before any is reported;
- configurations that differ in the seeds of their bricks alone are draws of one setting.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cfm_train.config.hashing import NOT_DECIDING
from cfm_train.configuration.expression import BrickRef, Call, Expression
from cfm_train.configuration.parser import parse
from cfm_train.errors import UserError
from cfm_train.library.card import Card, canonical
from cfm_train.library.store import Library

#: Parameters of a merge that are tuned.
TUNED = ("scale", "density", "weights")
#: Operations that make a brick from bricks.
MADE = ("merge", "stitch")

Json = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """Configurations along which one number changes and nothing else.

    Attributes:
        parameter: ``scale``, ``density`` or ``weights``.
        name: what the number is, for an axis.
        family: the configuration with ``*`` for the number.
        points: (the number, label of the configuration), in order.
    """

    parameter: str
    name: str
    family: str
    points: tuple[tuple[float, str], ...]


def opened(tree: Expression, library: Library) -> Expression:
    """The tree with the configuration that it was made by in place of every brick made from bricks.

    A brick whose own bricks are gone stays as it is, and within another configuration so does one
    with heads that were trained on it: made again from its bricks, it would not have them.

    Args:
        tree: a pinned tree.
        library: where its bricks lie.
    """
    if isinstance(tree, BrickRef):
        return _made(tree, library) or tree
    args = []
    for arg in tree.args:
        made = _made(arg, library) if isinstance(arg, BrickRef) else opened(arg, library)
        new_heads = isinstance(made, Call) and "heads" in dict(made.params)
        args.append(arg if made is None or new_heads else made)
    return Call(tree.fn, tree.rule, tuple(args), tree.params)


def _made(ref: BrickRef, library: Library) -> Expression | None:
    """The opened configuration of a brick that was made from bricks; None of any other."""
    card = library.find(str(ref))
    if card.operation not in MADE or not card.expression:
        return None
    try:
        return opened(parse(card.expression), library)
    except UserError:
        return None


def tuned_families(trees: Mapping[str, Expression]) -> list[list[str]]:
    """Labels of configurations that differ in what is tuned alone; families of one are left out.

    Args:
        trees: opened trees by label.
    """
    found: dict[str, list[str]] = {}
    for label, tree in trees.items():
        if _tuned(tree.to_dict()):
            found.setdefault(shape(tree), []).append(label)
    return [labels for labels in found.values() if len(labels) > 1]


def shape(tree: Expression) -> str:
    """The canonical JSON of a tree with ``*`` for everything that is tuned."""
    described = tree.to_dict()
    for params, key in _places(described):
        params[key] = "*"
    return canonical(described)


def curves(trees: Mapping[str, Expression]) -> list[Curve]:
    """Every line through configurations along which one tuned number changes alone.

    Args:
        trees: opened trees by label.
    """
    lines = []
    for labels in tuned_families(trees):
        values = {label: _tuned(trees[label].to_dict()) for label in labels}
        for place in values[labels[0]]:
            groups: dict[str, list[str]] = {}
            for label in labels:
                rest = {k: v for k, v in values[label].items() if k != place}
                groups.setdefault(canonical(rest), []).append(label)
            for members in groups.values():
                found = {label: values[label][place] for label in members}
                line = _line(place, found, trees[members[0]])
                if line is not None:
                    lines.append(line)
    return lines


def seed_families(
    trees: Mapping[str, Expression], library: Library, chosen: Collection[str] = ()
) -> list[list[str]]:
    """Labels of configurations that differ in the seeds of their bricks alone, two or more each.

    Args:
        trees: opened trees by label.
        library: where their bricks lie.
        chosen: those whose tuned values were chosen for each seed, and may differ therefore.
    """
    found: dict[str, dict[str, str]] = {}  # family -> versions -> the first label with them
    for label, tree in trees.items():
        described = tree.to_dict()
        for params, key in _places(described) if label in chosen else ():
            params[key] = "*"
        family = canonical(_seedless(described, library))
        found.setdefault(family, {}).setdefault(tree.to_json(), label)
    return [list(labels.values()) for labels in found.values() if len(labels) > 1]


def without_versions(label: str) -> str:
    """A configuration's text without the versions of its bricks."""
    return re.sub(r"@[0-9a-f]{1,12}\b", "", label)


def _seedless(node: Json, library: Library) -> Any:
    """A described tree with every brick as the hash of all that decides it but its seed."""
    if "brick" in node:
        card = library.find(f"{node['brick']}@{node['version']}")
        return _setting(card)
    params = {key: value for key, value in node["params"].items() if key != "seed"}
    args = [_seedless(arg, library) for arg in node["args"]]
    return {"call": node["call"], "rule": node["rule"], "args": args, "params": params}


def _setting(card: Card) -> str:
    """The hash of a trained brick's recipe without seed and name; else its version."""
    if card.operation != "train" or "seed" not in card.recipe:
        return card.version
    left_out = NOT_DECIDING | {"seed", "name"}
    recipe = {key: value for key, value in card.recipe.items() if key not in left_out}
    return hashlib.sha256(canonical(recipe).encode()).hexdigest()


def _places(node: Json, keys: Sequence[str] = TUNED) -> Iterator[tuple[Json, str]]:
    """The parameters of a described tree's merges that are tuned: the dict and the key in it."""
    if node.get("call") == "merge":
        yield from ((node["params"], key) for key in keys if key in node["params"])
    for arg in node.get("args", ()):
        yield from _places(arg, keys)


def _tuned(node: Json) -> dict[str, Any]:
    """The values of what is tuned, under names that are the same in trees of one shape."""
    return {f"{at}/{key}": params[key] for at, (params, key) in enumerate(_places(node))}


def _line(place: str, values: Mapping[str, Any], tree: Expression) -> Curve | None:
    """The line through values of one place; None where there are no two, or they are no numbers."""
    key = place.split("/")[1]
    numbers: dict[str, float]
    if key == "weights":
        found = _shares(values)
        if found is None:
            return None
        name, numbers = found
    else:
        name = {"scale": "λ (merge.scale)", "density": "density (merge.density)"}[key]
        numbers = {label: float(value) for label, value in values.items()}
    points = sorted((number, label) for label, number in numbers.items())
    if len({number for number, _ in points}) < 2:
        return None
    described = tree.to_dict()
    params, _ = list(_places(described))[int(place.split("/")[0])]
    params[key] = "*"
    return Curve(key, name, _short(described), tuple(points))


def _shares(values: Mapping[str, Any]) -> tuple[str, dict[str, float]] | None:
    """Weights as one number: the common weight, or the first of two that add up to the same."""
    plain = [v for v in values.values() if all(isinstance(w, int | float) for w in v)]
    if len(plain) < len(values):
        return None
    if all(len(set(v)) == 1 for v in plain):
        return "weight of each brick", {label: float(v[0]) for label, v in values.items()}
    if all(len(v) == 2 for v in plain) and len({round(sum(v), 9) for v in plain}) == 1:
        return "weight of the first brick", {label: float(v[0]) for label, v in values.items()}
    return None


def _short(node: Json) -> str:
    """A described tree as a person would write it: no versions, no parameter but tuned ones."""
    if "brick" in node:
        return str(node["brick"])
    parts = [node["rule"]] if node["rule"] else []
    parts.append(f"[{', '.join(map(_short, node['args']))}]")
    for key in (*TUNED, "heads") if node["call"] == "merge" else ("mode",):
        value = node["params"].get(key)
        if value is None or (key == "scale" and value == 1.0):
            continue
        if isinstance(value, list | tuple):
            if len({str(one) for one in value}) == 1:
                continue  # equal weights say nothing
            value = f"[{', '.join(map(_number, value))}]"
        parts.append(f"{key}={_number(value)}")
    return f"{node['call']}({', '.join(parts)})"


def _number(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_number, value))}]"
    return value if isinstance(value, str) else f"{value:g}"


def short(tree: Expression) -> str:
    """A tree as a person would write it, for charts: names, rules and what is tuned."""
    return _short(tree.to_dict())
