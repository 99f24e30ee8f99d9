"""From a configuration to what is plugged: bricks are read, merges computed, nothing guessed."""

from __future__ import annotations

import importlib

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.stored import open_brick
from cfm_train.config.merging import complete
from cfm_train.configuration.expression import BrickRef, Call, Expression, bricks
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
    # The methods lie above this room, so they are found when they are needed.
    engine = importlib.import_module("cfm_train.merging.engine")
    sidecars = importlib.import_module("cfm_train.merging.sidecars")
    mix = importlib.import_module("cfm_train.merging.mix").make_mix(
        complete(str(tree.rule), params)
    )
    statistics = None
    if mix.rule.needs is not None:
        cards = {str(ref): library.find(str(ref)) for ref in bricks(tree)}
        found = sidecars.find(mix.rule.needs, tree.args, cards, library)
        statistics = sidecars.read(found, mix.rule.needs)
    sources = [str(argument) for argument in tree.args]
    merged: Brick = engine.merge(
        parts, weights, mix, backbone, sources=sources, statistics=statistics
    ).brick
    return merged
