"""Weighted averaging: the sum of the parents' updates, each times its weight.

    ΔW = Σ wᵢ ΔWᵢ

For low-rank bricks the sum is taken of the updates, not of the factors (whose products would mix):
A is the parents' A stacked, B their wᵢ sᵢ Bᵢ side by side, exact at the sum of the ranks. For
other kinds the parameters themselves are averaged, so kind, options, sites and shapes must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.bank import bias_of
from cfm_train.bricks.brick import Brick, parameter_name
from cfm_train.bricks.heads import Head
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
            other = merged.head_for(task)
            if other is not None and not _same(other, head):
                raise UserError(
                    f"Two of the bricks bring different heads for '{task}', and heads are not "
                    "averaged: leave one of the bricks out."
                )
            merged.add_head(task, head)
    return merged.eval()


@torch.inference_mode()
def invariants(bricks: Sequence[Brick], backbone: Backbone) -> dict[str, dict[str, Any]]:
    """What the rule promises, tried on random tokens: weight 1 on one brick alone is that brick.

    Args:
        bricks: bricks that `merge` takes.
        backbone: the backbone, nothing plugged.

    Returns:
        The check for the record: the largest difference of hidden states (an encoder) or logits,
        as a share of the largest one.
    """
    size = backbone.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(size, (2, 12), generator=torch.Generator().manual_seed(0))
    worst = 0.0
    for i, brick in enumerate(bricks):
        alone = _outputs(backbone, brick, ids)
        weights = [float(i == k) for k in range(len(bricks))]
        found = _outputs(backbone, merge(bricks, weights, backbone), ids)
        worst = max(worst, ((found - alone).abs().max() / alone.abs().max()).item())
    # A rounding of the factors, which the layers above carry on.
    tolerance = 1e-4 if backbone.dtype == torch.float32 else 0.1
    return {
        "weight 1 on one brick is that brick": {
            "value": worst,
            "tolerance": tolerance,
            "passed": worst <= tolerance,
        }
    }


def _outputs(backbone: Backbone, brick: Brick, ids: Tensor) -> Tensor:
    ids = ids.to(backbone.device)
    with backbone.slots.plugged([brick]):
        if backbone.model.get_output_embeddings() is None:
            return backbone.hidden_states(ids).float()
        more = {"decoder_input_ids": ids} if backbone.family == "encoder-decoder" else {}
        return backbone.logits(input_ids=ids, **more).float()


def _same(one: Head, other: Head) -> bool:
    """Whether two heads are one: a brick and a merge of it carry the same."""
    a, b = one.state_dict(), other.state_dict()
    return one.describe() == other.describe() and all(torch.equal(a[k], b[k]) for k in a)


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
    for brick in bricks[1:]:
        _refuse_difference(first, brick)
    merged = type(first).restore(first.interface(), first.body_files(), backbone)
    states = [_body(brick) for brick in bricks]
    with torch.no_grad():
        for name, value in _body(merged).items():
            parents = [state[name].detach() for state in states]
            if isinstance(value, nn.Parameter):
                terms = [w * p.double() for w, p in zip(weights, parents, strict=True)]
                value.copy_(torch.stack(terms).sum(0))
            elif not all(torch.equal(p, parents[0]) for p in parents):
                raise UserError(
                    f"The {first.kind} bricks differ in '{name}', which is no parameter that can "
                    "be averaged: make them with the same options and seed."
                )
    return merged


def _body(brick: Brick) -> dict[str, Tensor]:
    """Parameters and buffers without those of the heads, not detached."""
    state = brick.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if not name.startswith("heads.")}


def _refuse_difference(one: Brick, other: Brick) -> None:
    """Refuses bricks whose parameters do not mean the same.

    Raises:
        UserError: they differ in sites, in shapes, or in an option that decides what they compute.
    """
    for key, value in one.hyper.items():
        if key not in ("sites", "layers", "dropout") and other.hyper.get(key) != value:
            raise UserError(
                f"The {one.kind} bricks differ in brick.{key} ({value} and "
                f"{other.hyper.get(key)}): they cannot be averaged."
            )
    a, b = _body(one), _body(other)
    different = sorted(n for n in a.keys() | b.keys() if n not in a or n not in b)
    different += [n for n in a if n in b and a[n].shape != b[n].shape]
    if different or one.site_names != other.site_names:
        where = f" (first at '{different[0]}')" if different else ""
        raise UserError(
            f"The {one.kind} bricks differ in their sites or shapes{where}: they cannot be "
            "averaged."
        )
