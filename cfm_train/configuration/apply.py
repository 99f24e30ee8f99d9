"""From a configuration to what is plugged: bricks read, merges and stitches made, none guessed."""

from __future__ import annotations

import importlib
from typing import Any

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.stored import open_brick, open_heads
from cfm_train.config.merging import complete
from cfm_train.configuration.expression import BrickRef, Call, Expression, bricks
from cfm_train.configuration.opened import stitch_tree, unmergeable
from cfm_train.configuration.pin import with_defaults
from cfm_train.errors import UserError
from cfm_train.library import gate
from cfm_train.library.card import STITCH, Card
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
        card = library.find(str(tree))
        if card.kind == STITCH:
            return open_stitch(card, library, backbone)
        return open_brick(card, library, backbone)
    if tree.fn == "stitch":
        return stitch(tree, library, backbone)
    if tree.fn != "merge":
        raise UserError(
            f"'{tree}' cannot be applied: so far only bricks, merge(RULE, [...]) and stitch([...]) "
            "can be."
        )
    parts = [plain(assemble(argument, library, backbone), backbone) for argument in tree.args]
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


def stitch(tree: Call, library: Library, backbone: Backbone) -> Brick:
    """The brick that ``stitch([…], mode=…)`` stands for (`cfm_train.stitching`).

    Raises:
        UserError: a brick is missing, or the mode does not exist or cannot stitch them.
    """
    params = dict(with_defaults(tree).params)
    mode = params.pop("mode")
    if params:
        raise UserError(f"stitch([…]) does not know the parameter '{min(params)}'.")
    parts = [assemble(argument, library, backbone) for argument in tree.args]
    stitching = importlib.import_module("cfm_train.stitching.stitch")
    made: Any = stitching.stitch_bricks(str(mode), parts, backbone, list(map(str, tree.args)))
    made.expression = str(with_defaults(tree))
    stitched: Brick = made
    return stitched


def open_stitch(card: Card, library: Library, backbone: Backbone) -> Brick:
    """A stitch from the library: its expression evaluated, with the heads that it was stored with.

    Raises:
        UserError: one of its bricks is no longer in the library, or it fits another backbone.
    """
    gate.require_backbone(card, backbone.fingerprint, backbone.id)
    gate.check_artifact(card, library.folder(card))
    tree = stitch_tree(card)
    try:
        made = assemble(tree, library, backbone)
    except UserError as error:
        raise UserError(f"{card.ref} = {tree} cannot be opened: {error}") from None
    made.heads.clear()
    open_heads(made, card, library)
    return made.to(backbone.device).eval().requires_grad_(False)


def plain(brick: Brick, backbone: Backbone) -> Brick:
    """A stitch of low-rank updates as the one LoRA that it is, so that it can be merged.

    Raises:
        UserError: it is a stitch of something else, which has no parameters of its own to merge.
    """
    if brick.kind != STITCH:
        return brick
    stitched: Any = brick
    if not stitched.foldable():
        what = next((p.what for p in stitched.places if p.port != "linear"), "head")
        raise UserError(unmergeable("The stitch", what))
    folded: Brick = importlib.import_module("cfm_train.stitching.fold").fold(stitched, backbone)
    return folded
