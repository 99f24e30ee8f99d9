"""The update of each site's weight, ``ΔW = s B A``: any ranks, alphas and sites.

A weighted sum is exact, and truncated to a rank without multiplying anything out. Other rules look
at the numbers of ΔW, so it is multiplied out one site at a time, merged, and cut to a rank: the sum
of the parents' ranks unless one is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfm_train.bricks.brick import Brick
from cfm_train.bricks.lora import LoRA
from cfm_train.errors import UserError
from cfm_train.merging.spaces.low_rank import (
    Merged,
    added_bias,
    dense,
    factors,
    is_dora,
    low_rank,
    truncate_dense,
)
from cfm_train.merging.spaces.space import Entry, Options, Result, Space

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


class Delta(Space):
    """Updates of weights, and of biases."""

    def __init__(self, bricks: Sequence[Brick], backbone: Backbone, options: Options) -> None:
        super().__init__(bricks, backbone, options)
        self.loras = low_rank(bricks, self.kind)
        self.merged = Merged(self.loras, backbone, options)
        if any(map(is_dora, self.loras)) and options.rank is None:
            raise UserError(
                "The update of a DoRA brick has full rank: give merge.rank=16 or another rank to "
                "cut the merge to, or use merge.space=parameters."
            )

    def breaks(self) -> frozenset[str]:
        """DoRA's update is cut to a rank, so nothing is exactly what it was."""
        dora = any(map(is_dora, self.loras))
        return frozenset({"identity", "idempotent", "cancel"} if dora else ())

    def refuse_overlap(self) -> None:
        """See the contract."""
        self.merged.refuse_overlap()

    def entries(self) -> Iterator[Entry]:
        """ΔW ``[out, in]`` and the bias ``[out]`` of every site, float32."""
        for site in self.merged.sites():
            load = functools.partial(self._stacked, site, functools.partial(self._dense, site))
            yield Entry(f"{site}.weight", site, load, statistics=True)
            if self.merged.has_bias(site):
                yield bias_entry(self.merged, site)

    def put(self, entry: Entry, merged: Tensor) -> None:
        """See the contract; the cut's loss is noted."""
        if entry.name.endswith(".bias"):
            self.merged.add_bias(entry.site, merged.double())
            return
        rank = self.options.rank or self.merged.whole_rank(entry.site)
        update = merged.double() * self.options.scale
        self.merged.add(entry.site, truncate_dense(update, rank))

    def result(self) -> Result:
        """A LoRA brick."""
        return self.merged.result()

    def add_up(self, weights: Callable[[str], Sequence[float]]) -> bool:
        """The factors side by side, B times the weight."""
        if any(map(is_dora, self.loras)):
            return False
        for site in self.merged.sites():
            parts = [
                (factors(brick, site), weight)
                for brick, weight in zip(self.loras, weights(site), strict=True)
                if site in brick.scales
            ]
            left = torch.cat([found.B * weight for found, weight in parts], dim=1)
            self.merged.add_product(site, left, torch.cat([found.A for found, _ in parts]))
            if self.merged.has_bias(site):
                stacked = bias_entry(self.merged, site).load()
                given = torch.tensor(weights(site), dtype=stacked.dtype)
                self.merged.add_bias(site, given.to(stacked.device) @ stacked)
        return True

    def _dense(self, site: str, brick: LoRA) -> Tensor | None:
        return dense(brick, site, self.backbone) if site in brick.scales else None

    def _stacked(self, site: str, load: Callable[[LoRA], Tensor | None]) -> Tensor:
        """``[N, out, in]`` float32; zeros for bricks that do not touch the site."""
        place = self.backbone.sites[site]
        stack = torch.zeros(len(self.loras), place.out_features, place.in_features)
        for part, brick in zip(stack, self.loras, strict=True):
            update = load(brick)
            if update is not None:
                part.copy_(update)
        return stack


def bias_entry(merged: Merged, site: str) -> Entry:
    """The biases that the bricks add at a site, ``[N, out]`` float64."""

    def load() -> Tensor:
        width = merged.backbone.sites[site].out_features
        nothing = torch.zeros(width, dtype=torch.float64)
        found = [added_bias(brick, site, merged.backbone) for brick in merged.bricks]
        return torch.stack([nothing if bias is None else bias.cpu() for bias in found])

    return Entry(f"{site}.bias", site, load)
