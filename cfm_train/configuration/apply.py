"""From a configuration to what is plugged: bricks are read, merges computed, nothing guessed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

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
        UserError: a brick is missing or needs another backbone, or the combination cannot be applied.
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
    return merge_bricks(str(tree.rule), parts, weights, backbone)  # type: ignore[arg-type]


def merge_bricks(
    rule: str, parts: Sequence[Brick], weights: Sequence[float] | None, backbone: Backbone
) -> Brick:
    """One brick from several by a rule of `cfm_train.merging`; without weights all weigh the same."""
    rules = {path.stem for path in (PACKAGE / "merging").glob("[!_]*.py")}
    if rule not in rules:
        raise UserError(f"There is no merge rule '{rule}'.{nearest(rule, rules)}")
    shares = [1 / len(parts)] * len(parts) if weights is None else [float(w) for w in weights]
    if len(shares) != len(parts):
        raise UserError(
            f"weights has {len(shares)} numbers for {len(parts)} bricks: give one each."
        )
    module = importlib.import_module(f"cfm_train.merging.{rule}")
    merged: Brick = module.merge(parts, shares, backbone)
    return merged
