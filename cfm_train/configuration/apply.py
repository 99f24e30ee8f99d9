"""From a configuration to what is plugged: bricks are read, merges computed, nothing guessed."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from types import ModuleType

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.stored import open_brick
from cfm_train.configuration.expression import BrickRef, Call, Expression
from cfm_train.errors import UserError, nearest
from cfm_train.library.store import Library
from cfm_train.paths import PACKAGE


def assemble(tree: Expression, library: Library, backbone: Backbone) -> Brick:
    """The brick that a configuration stands for.

    Args:
        tree: the configuration.
        library: where its bricks lie.
        backbone: what it will be plugged into.

    Raises:
        UserError: a brick is missing or needs another backbone, or the combination cannot be
            applied.
    """
    if isinstance(tree, BrickRef):
        return open_brick(library.find(str(tree)), library, backbone)
    if not isinstance(tree, Call) or tree.fn != "merge":
        raise UserError(
            f"'{tree}' cannot be applied: so far only bricks and merge(RULE, [...]) can be."
        )
    parts = [assemble(argument, library, backbone) for argument in tree.args]
    params = dict(tree.params)
    weights = params.pop("weights", None)
    if params:
        raise UserError(f"merge({tree.rule}, …) does not know the parameter '{min(params)}'.")
    return merge_bricks(str(tree.rule), parts, weights, backbone)


def merge_rule(rule: str) -> ModuleType:
    """The module of a merge rule, found by its file's name.

    Raises:
        UserError: there is no such rule.
    """
    rules = {path.stem for path in (PACKAGE / "merging").glob("[!_]*.py")}
    if rule not in rules:
        raise UserError(f"There is no merge rule '{rule}'.{nearest(rule, rules)}")
    return importlib.import_module(f"cfm_train.merging.{rule}")


def merge_bricks(rule: str, parts: Sequence[Brick], weights: object, backbone: Backbone) -> Brick:
    """One brick from several by a rule of `cfm_train.merging`; all weigh the same by default."""
    module = merge_rule(rule)
    shares = [1 / len(parts)] * len(parts) if weights is None else numbers(weights)
    if len(shares) != len(parts):
        raise UserError(
            f"weights has {len(shares)} numbers for {len(parts)} bricks: give one each."
        )
    merged: Brick = module.merge(parts, shares, backbone)
    return merged


def numbers(weights: object) -> list[float]:
    """Weights as a person gave them, as numbers.

    Raises:
        UserError: they are no list of finite numbers.
    """
    right = isinstance(weights, Sequence) and all(
        isinstance(w, int | float) and not isinstance(w, bool) and math.isfinite(w) for w in weights
    )
    if not right:
        raise UserError(
            f"weights={weights} is no list of numbers: give one for each brick, as in [0.3,0.7]."
        )
    return [float(w) for w in weights]  # type: ignore[attr-defined]
