"""Folding: a stitch of plain low-rank bricks is a low-rank update again, so it can be one LoRA.

    sum     A = [A₁; A₂],                  B = [s₁B₁, s₂B₂]          rank r₁ + r₂
    pipe    A = A₁,                        B = s₂B₂ (A₂ s₁B₁)        rank r₁
    chain   A = [A₁; A₂ (I + s₁B₁A₁)],     B = [s₁B₁, s₂B₂]          rank r₁ + r₂

Exact up to one rounding of the factors. The scales are in B (alpha = rank), biases of B add up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cfm_train.bricks.lora import LoRA
from cfm_train.bricks.peft_modules import TASK_TYPES
from cfm_train.stitching.stitch import Stitch

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


def fold(stitched: Stitch, backbone: Backbone) -> LoRA:
    """The LoRA that answers as the stitch does, with its heads.

    Args:
        stitched: a stitch.
        backbone: the backbone that it was made for.

    Raises:
        UserError: one of its bricks is no plain low-rank update.
    """
    updates = stitched.updates()
    rank = max(update.A.shape[0] for update in updates.values())
    biased = any(update.c is not None for update in updates.values())
    folded = LoRA(
        rank=rank,
        alpha=rank,
        dropout=0.0,
        sites=[name for name in backbone.sites if name in updates],
        layers=None,
        rslora=False,
        dora=False,
        bias="lora_bias" if biased else "none",
    )
    folded.task_type = TASK_TYPES[backbone.family]
    for name in folded.hyper["sites"]:
        site, update = backbone.sites[name], updates[name]
        c = update.c
        if biased and c is None:
            c = torch.zeros(site.out_features, device=update.B.device)
        folded.add_site(site, update.A, update.B, update.A.shape[0], None, c)
        folded.know(backbone, site)
    for task, head in stitched.heads.items():
        folded.add_head(task, head)
    return folded.to(backbone.device).eval().requires_grad_(False)
