"""From a configuration to what is plugged: bricks are read, merges computed, nothing guessed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.stored import open_brick
from cfm_train.config.merging import complete
from cfm_train.configuration.expression import BrickRef, Call, Expression
from cfm_train.errors import UserError
from cfm_train.library.store import Library


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
    return merge_bricks(str(tree.rule), params, parts, weights, list(map(str, tree.args)), backbone)


def merge_bricks(
    rule: str,
    parameters: Mapping[str, Any],
    parts: Sequence[Brick],
    weights: object,
    sources: Sequence[str],
    backbone: Backbone,
) -> Brick:
    """One brick from several by a rule of ``conf/rule`` with some of its parameters."""
    # The methods lie above this room, so they are found when they are needed.
    engine = importlib.import_module("cfm_train.merging.engine")
    mix = importlib.import_module("cfm_train.merging.mix").make_mix(complete(rule, parameters))
    merged: Brick = engine.merge(parts, weights, mix, backbone, sources=sources).brick
    return merged
