"""Weighted averaging: the sum of the parents' updates, each times its weight.

    ΔW = Σ wᵢ ΔWᵢ

For low-rank bricks the sum is taken of the updates, not of the factors (whose products would mix):
A is the parents' A stacked, B their wᵢ sᵢ Bᵢ side by side, exact at the sum of the ranks. For
other kinds the parameters themselves are averaged, so kind, sites and shapes must agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.bank import bias_of
from cfm_train.bricks.brick import Brick, parameter_name
from cfm_train.bricks.lora import LoRA
from cfm_train.errors import UserError


def merge(bricks: Sequence[Brick], weights: Sequence[float], backbone: Backbone) -> Brick:
    """The weighted sum of some bricks, with the heads of all of them.

    Args:
        bricks: at least one brick; all of one kind.
        weights: one number for each.
        backbone: the backbone they were made for.

    Raises:
        UserError: the kinds differ, or parameters that cannot be added up.
    """
    kinds = sorted({brick.kind for brick in bricks})
    if len(kinds) > 1:
        raise UserError(
            f"Bricks of the kinds {' and '.join(kinds)} cannot be averaged: use one kind."
        )
    if all(isinstance(brick, LoRA) for brick in bricks):
        merged: Brick = _low_rank(list(bricks), weights, backbone)  # type: ignore[arg-type]
    else:
        merged = _parameters(bricks, weights, backbone)
    for brick in bricks:
        for task, head in brick.heads.items():
            if task in merged.heads:
                raise UserError(f"Two of the bricks bring a head for '{task}': merge one of them.")
            merged.add_head(task, head)  # type: ignore[arg-type]
    return merged.eval()


def _low_rank(bricks: list[LoRA], weights: Sequence[float], backbone: Backbone) -> LoRA:
    if any(len(brick.magnitude) for brick in bricks):
        raise UserError(
            "DoRA bricks cannot be averaged: their update is not a sum; merge plain LoRA bricks."
        )
    sites = [name for name in backbone.sites if any(name in brick.scales for brick in bricks)]
    rank = sum(brick.hyper["rank"] for brick in bricks)
    merged = LoRA(
        rank=rank,
        alpha=rank,
        dropout=0.0,
        sites=sites,
        layers=None,
        rslora=False,
        dora=False,
        bias="lora_bias" if any(len(brick.bias) for brick in bricks) else "none",
    )
    merged.task_type = bricks[0].task_type
    for name in sites:
        site = backbone.sites[name]
        key = parameter_name(name)
        parents = [(b, w) for b, w in zip(bricks, weights, strict=True) if name in b.scales]
        A = torch.cat([b.lora_A[key].detach() for b, _ in parents])
        B = torch.cat([b.lora_B[key].detach() * (w * b.scales[name]) for b, w in parents], dim=1)
        bias = None
        if merged.hyper["bias"] == "lora_bias":
            bias = torch.zeros(site.out_features, device=B.device)
            for brick, weight in parents:
                bias = bias + weight * _added_bias(brick, name, backbone)
        merged.add_site(site, A, B, A.shape[0], None, bias)
        merged.know(backbone, site)
    return merged


def _added_bias(brick: LoRA, name: str, backbone: Backbone) -> Tensor | float:
    """What a brick adds to a site's output whatever the input is, ``[out_features]``."""
    key = parameter_name(name)
    if key not in brick.bias:
        return 0.0
    bias = brick.bias[key].detach()
    if brick.hyper["bias"] == "lora_bias":
        return brick.scales[name] * bias
    site = backbone.sites[name]
    own = bias_of(backbone.model.get_submodule(site.module), site)
    return bias if own is None else bias - own.to(bias.dtype)


def _parameters(bricks: Sequence[Brick], weights: Sequence[float], backbone: Backbone) -> Brick:
    first = bricks[0]
    merged = type(first)(**first.hyper).build(backbone)
    states = [brick.tensors() for brick in bricks]
    for state, brick in zip(states[1:], bricks[1:], strict=True):
        different = [n for n in states[0] if n not in state or state[n].shape != states[0][n].shape]
        if different or state.keys() != states[0].keys():
            raise UserError(
                f"The {brick.kind} bricks differ in their sites or shapes"
                f"{f' (first at {different[0]!r})' if different else ''}: they cannot be averaged."
            )
    merged.load_tensors(
        {
            name: torch.stack(
                [w * s[name].float() for s, w in zip(states, weights, strict=True)]
            ).sum(0)
            for name in states[0]
        }
    )
    return merged
