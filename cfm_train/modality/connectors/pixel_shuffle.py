"""Neighbours put together, then a projection (pixel shuffle: Idefics3, nanoVLM, InternVL).

a grid [g, g, d_v] ─► [g/s, g/s, s²·d_v] ─► h = W v          n/s² tokens, nothing thrown away
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from cfm_train.config.types import Positive
from cfm_train.modality.connectors.connector import Connector, projection
from cfm_train.modality.fitting import grid_side


class PixelShuffle(Connector):
    """Space to depth on a square grid, then one linear map.

    Args:
        factor: s, neighbours along each side that become one token.
    """

    def __init__(self, factor: Positive) -> None:
        super().__init__()
        self.factor = factor

    def build(self, width: int, hidden: int, scale: float) -> Self:
        """One matrix ``[d, s²·d_v]`` without a bias."""
        self.project = projection(self.factor**2 * width, hidden, scale, bias=False)
        return self

    def count(self, n: int) -> int:
        """``n / s²``.

        Raises:
            UserError: the vectors are no square grid that the factor divides.
        """
        grid_side(n, self.factor)
        return n // self.factor**2

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """See `Connector.forward`; all vectors of an item are there."""
        items, n, width = features.shape
        s, side = self.factor, grid_side(n, self.factor)
        grid = features.reshape(items, side // s, s, side // s, s, width)
        together = grid.permute(0, 1, 3, 2, 4, 5).reshape(items, -1, s * s * width)
        return self.project(together), torch.ones(
            together.shape[:2], dtype=torch.bool, device=mask.device
        )
