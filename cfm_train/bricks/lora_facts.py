"""Low-rank updates for facts: LoRA in which every fact has matrices of its own.

    y ← y + (alpha / r) B_i A_i x          x, y: a linear site's input and output, i: the row's fact

LoRA (Hu et al. 2021, arXiv 2106.09685) with one adapter for each row of a batch, as in Punica (Chen
et al. 2023, arXiv 2310.18547), where what is adapted to is a fact (`bricks/facts.py`). A starts as
noise, the same for every fact, B as zero: a new brick changes nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from cfm_train.backbone.plugs import Call, Out
from cfm_train.bricks.brick import Brick, linear_sites, parameter_name, some
from cfm_train.bricks.facts import ByFact, row_mask, stack
from cfm_train.config.types import Positive, Rate

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


class LoraFacts(ByFact, Brick):
    """A low-rank update of linear sites, for each fact one.

    Args:
        rank: rank of a fact's update, at least 1.
        alpha: the update is scaled by alpha / rank.
        sites: patterns of linear sites, such as ``attn.v`` or ``ffn.down``.
        layers: numbers of the layers to use, negative ones from the top; None for all.
    """

    def __init__(
        self, rank: Positive, alpha: Rate, sites: list[str], layers: list[int] | None
    ) -> None:
        super().__init__(rank=rank, alpha=alpha, sites=sites, layers=layers)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.begin()

    def build(self, backbone: Backbone) -> Self:
        """Makes ``A [facts, rank, in]`` and ``B [facts, out, rank]`` for every chosen site."""
        self.know(backbone)
        count, rank = len(self), self.hyper["rank"]
        sites = some(linear_sites(backbone, self.hyper["sites"], self.hyper["layers"]), "sites")
        for site in sites:
            key = parameter_name(site.name)
            drawn = torch.randn(rank, site.in_features) / math.sqrt(site.in_features)
            self.lora_A[key] = nn.Parameter(drawn.expand(count, -1, -1).clone())
            self.lora_B[key] = stack(count, site.out_features, rank)
        self.site_names = tuple(site.name for site in sites)
        return self.to(backbone.device)

    def plugs(self) -> Iterable[Out]:
        """One plug for each site, and the one that decides which fact acts."""
        if self.facts:
            yield self.watch()
        for name in self.site_names:
            yield Out(name, functools.partial(self._add, parameter_name(name)))

    def _add(self, key: str, call: Call) -> Tensor:
        assert call.y is not None
        x, y = call.x.to(call.y.dtype), call.y
        A, B = self.lora_A[key], self.lora_B[key]
        scale = self.hyper["alpha"] / self.hyper["rank"]
        if not self.facts or (self.gate is None and self.chosen is None):  # all on every row
            fired = x @ A.flatten(0, 1).to(y.dtype).t()  # [batch, seq, facts * rank]
            return y + scale * (fired @ B.transpose(1, 2).flatten(0, 1).to(y.dtype))
        facts = self.places(y.shape[0])
        if bool((facts < 0).all()):
            return y
        index = facts.clamp_min(0).to(y.device)
        fired = torch.einsum("b...i,bri->b...r", x, A[index].to(y.dtype))
        part = torch.einsum("b...r,bor->b...o", fired, B[index].to(y.dtype))
        return torch.where(row_mask(facts, y), y + scale * part, y)
