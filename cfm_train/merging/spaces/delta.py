"""The update of each site's weight, ``ΔW = s B A``: any ranks, alphas and sites.

A weighted sum is exact, and truncated to a rank without multiplying anything out. Other rules look
at the numbers of ΔW, so it is multiplied out one site at a time, merged, and cut to a rank: the sum
of the parents' ranks unless one is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfm_train.bricks.brick import Brick
from cfm_train.errors import UserError
from cfm_train.merging.spaces.low_rank import (
    LowRankSpace,
    dense,
    factors,
    is_dora,
    truncate_dense,
)
from cfm_train.merging.spaces.space import Entry, Options

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


class Delta(LowRankSpace):
    """Updates of weights, and of biases."""

    def __init__(self, bricks: Sequence[Brick], backbone: Backbone, options: Options) -> None:
        super().__init__(bricks, backbone, options)
        if any(map(is_dora, self.loras)) and options.rank is None:
            raise UserError(
                "The update of a DoRA brick has full rank: give merge.rank=16 or another rank to "
                "cut the merge to, or use merge.space=parameters."
            )

    def breaks(self) -> frozenset[str]:
        """DoRA's update is cut to a rank, so nothing is exactly what it was."""
        dora = any(map(is_dora, self.loras))
        return frozenset({"identity", "idempotent", "cancel"} if dora else ())

    def update_entry(self, site: str) -> Entry:
        """ΔW ``[out, in]``, float32."""
        return Entry(
            f"{site}.weight", site, functools.partial(self._stacked, site), statistics=True
        )

    def put_update(self, site: str, merged: Tensor) -> None:
        """See the contract; the cut's loss is noted."""
        rank = self.options.rank or self.merged.whole_rank(site)
        self.merged.add(site, truncate_dense(merged * self.options.scale, rank))

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
                stacked = self.biases(site)
                given = torch.tensor(weights(site), dtype=stacked.dtype)
                self.merged.add_bias(site, given.to(stacked.device) @ stacked)
        return True

    def _stacked(self, site: str) -> Tensor:
        """``[N, out, in]`` float32; zeros for bricks that do not touch the site."""
        place = self.backbone.sites[site]
        stack = torch.zeros(len(self.loras), place.out_features, place.in_features)
        for part, brick in zip(stack, self.loras, strict=True):
            if site in brick.scales:
                part.copy_(dense(brick, site, self.backbone))
        return stack
