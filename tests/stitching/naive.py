"""Stitches by hand: wrapped modules in a plain transformers model, formulas in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.bottleneck import Bottleneck
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.lora import LoRA
from tests.backbones import answers, plain_model

Contribution = Callable[[Tensor], Tensor]


def contribution(brick: Any, site: str) -> Contribution | None:
    """b of one brick at one site, None where it has none."""
    key = site.replace(".", "-")
    if site not in brick.site_names:
        return None
    if isinstance(brick, LoRA):
        A, B = brick.lora_A[key].detach().double(), brick.lora_B[key].detach().double()
        c = brick.bias[key].detach().double() if key in brick.bias else 0.0
        rank = A.shape[0]
        scale = brick.alphas[site] / (rank**0.5 if brick.hyper["rslora"] else rank)
        return lambda x: scale * (x @ A.T @ B.T + c)
    assert isinstance(brick, Bottleneck)
    D, d, U, u = (
        part[key].detach().double()
        for part in (brick.down, brick.down_bias, brick.up, brick.up_bias)
    )
    return lambda y: brick.hyper["scale"] * (F.gelu(y @ D.T + d) @ U.T + u)


def change(mode: str, h: Tensor, bricks: Sequence[Contribution | None]) -> Tensor:
    """What is added to a site, by the formulas of the modes' docstrings."""
    acting = [b for b in bricks if b is not None]
    if mode == "sum" or len(acting) == 1:
        return torch.stack([b(h) for b in acting]).sum(0)
    start = h
    for b in acting:
        h = h + b(h) if mode == "chain" else b(h)
    return h - start if mode == "chain" else h


class Wrapped(nn.Module):
    """A module with something added to some of its output features."""

    def __init__(
        self, inner: nn.Module, mode: str, at_output: bool, sites: list[tuple[Any, list[Any]]]
    ) -> None:
        super().__init__()
        self.inner, self.mode, self.at_output, self.sites = inner, mode, at_output, sites

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)  # T5 asks its linear maps for their weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        for rows, bricks in self.sites:
            spans = [(0, y.shape[-1])] if rows is None else rows
            part = torch.cat([y[..., a:b] for a, b in spans], -1).double()
            added = change(self.mode, part if self.at_output else x.double(), bricks)
            y, at = y.clone(), 0
            for a, b in spans:
                y[..., a:b] += added[..., at : at + b - a].to(y.dtype)
                at += b - a
        return y


@torch.no_grad()
def naive(
    family: str, backbone: Backbone, mode: str, bricks: Sequence[Brick], inputs: dict[str, Tensor]
) -> Tensor:
    """The answers of a plain model with bricks of one kind stitched into it by hand."""
    model = plain_model(family)
    at_output = isinstance(bricks[0], Bottleneck)
    by_module: dict[str, list[tuple[Any, list[Any]]]] = {}
    for name, site in backbone.sites.items():
        found = [contribution(brick, name) for brick in bricks]
        if any(b is not None for b in found):
            by_module.setdefault(site.module, []).append((site.rows, found))
    for path, sites in by_module.items():
        parent, _, last = path.rpartition(".")
        inner = model.get_submodule(path)
        setattr(model.get_submodule(parent), last, Wrapped(inner, mode, at_output, sites))
    return answers(model, inputs)
