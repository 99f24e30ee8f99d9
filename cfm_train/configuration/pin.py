"""Pinning: every brick of a tree gets the full version that its name means now, and every
combination all of its parameters."""

from __future__ import annotations

from typing import Any, Protocol

from cfm_train.config import merging
from cfm_train.configuration.expression import BrickRef, Call, Expression, Value
from cfm_train.errors import UserError
from cfm_train.library.card import Card

#: What a parameter is where a configuration leaves it out.
DEFAULTS: dict[str, dict[str, Value]] = {"stitch": {"mode": "chain"}}


class Finder(Protocol):
    """The part of a library that pinning needs."""

    def find(self, ref: str) -> Card:
        """The card behind ``name`` or ``name@prefix``; UserError where there is none."""


def pin(tree: Expression, library: Finder) -> Expression:
    """The same tree with all versions and parameters written out.

    Args:
        tree: a tree as it was parsed.
        library: where the bricks lie.

    Returns:
        A tree whose text, JSON and digest mean the same for ever.

    Raises:
        UserError: a brick does not exist, or its version is ambiguous, or a parameter is wrong.
    """
    if isinstance(tree, BrickRef):
        card = library.find(str(tree))
        return BrickRef(card.name, card.version)
    rule, params = tree.rule, tree.params
    for name in dict(params).keys() - DEFAULTS["stitch"].keys() if tree.fn == "stitch" else ():
        raise UserError(f"stitch([…]) does not know the parameter '{name}', only mode.")
    if tree.fn == "merge":
        rule, params = _all_parameters(str(rule), dict(params), len(tree.args))
    args = tuple(pin(arg, library) for arg in tree.args)
    return with_defaults(Call(tree.fn, rule, args, params))


def with_defaults(call: Call) -> Call:
    """The same call with the parameters that it left out (of a merge, see `config.merging`)."""
    given = dict(call.params)
    left = {k: v for k, v in DEFAULTS.get(call.fn, {}).items() if k not in given}
    if not left:
        return call
    return Call(call.fn, call.rule, call.args, (*call.params, *left.items()))


def _all_parameters(
    rule: str, given: dict[str, Any], count: int
) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """A merge's rule (of a preset's name) and parameters, with the defaults of its YAML."""
    weights = given.pop("weights", None)
    full = merging.complete(rule, given)
    name = full.pop("rule")
    merging.check_count(name, count)
    if weights is not None or full["equal"] is not None:
        full["weights"] = merging.default_weights(weights, count, full["equal"], name)
    return name, tuple(full.items())
