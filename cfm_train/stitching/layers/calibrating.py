"""What the two models make of the same tokens: CKA of all their layers, moments of two of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cfm_train.backbone.load import Backbone
from cfm_train.data.encode import Encoded
from cfm_train.stitching.layers.capture import layers_of, recording
from cfm_train.stitching.layers.cka import BLOCK, CKA
from cfm_train.stitching.layers.ridge import Moments
from cfm_train.training.dataset import make_batch
from cfm_train.training.seeding import derive

#: Rows of one forward pass.
ROWS = 16


def similarity(
    bottom: Backbone, top: Backbone, rows: Encoded, tokens: int, seed: int
) -> list[list[float]]:
    """Linear CKA of every state of the bottom with every state of the top.

    Args:
        bottom, top: the models, whole.
        rows: calibration rows.
        tokens: about how many tokens are read; blocks are drawn from all of a batch's.
        seed: draws rows and tokens.

    Returns:
        ``[bottom layers + 1, top layers + 1]``.
    """
    cka = CKA()
    generator = torch.Generator().manual_seed(derive(seed, "cka"))
    for xs, ys in _states(bottom, top, rows, None, seed):
        order = torch.randperm(len(xs[0]), generator=generator)
        for chosen in order.split(BLOCK):
            if len(chosen) == BLOCK or (not cka.blocks and len(chosen) >= 4):
                cka.add([x[chosen] for x in xs], [y[chosen] for y in ys])
            if cka.blocks * BLOCK >= tokens:
                return cka.matrix()
    return cka.matrix()


def moments(
    bottom: Backbone,
    top: Backbone,
    at: tuple[int, int],
    rows: Encoded,
    tokens: int | None,
    seed: int,
    like: Moments | None = None,
) -> Moments:
    """Moments of what goes into the bridge and of what should come out of it.

    Args:
        bottom, top: the models, whole.
        at: the stitch point.
        rows: calibration rows.
        tokens: about how many tokens are read; None for all.
        seed: draws the rows.
        like: see `Moments`.
    """
    found = Moments(like)
    for xs, ys in _states(bottom, top, rows, at, seed):
        found.add(xs[0], ys[0])
        if tokens is not None and found.count >= tokens:
            break
    return found


@torch.inference_mode()
def _states(
    bottom: Backbone, top: Backbone, rows: Encoded, at: tuple[int, int] | None, seed: int
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """States of real tokens, a batch of rows at a time: of all layers, or of two.

    Yields:
        For each model its states ``[tokens, width]``.
    """
    order = np.random.default_rng(derive(seed, "calibration")).permutation(len(rows))
    pad = bottom.tokenizer.pad_token_id
    with recording(layers_of(bottom)) as below, recording(layers_of(top)) as above:
        for start in range(0, len(order), ROWS):
            batch = make_batch("calibration", rows, order[start : start + ROWS], pad)
            ids = batch["input_ids"].to(bottom.device)
            mask = batch["attention_mask"].to(bottom.device)
            for model in (bottom, top):
                model.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            real = mask.bool()
            xs = below if at is None else [below[at[0]]]
            ys = above if at is None else [above[at[1]]]
            yield [x[real] for x in xs], [y[real] for y in ys]
