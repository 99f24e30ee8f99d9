"""A Q-Former at each window of a sequence: sounds and series (SALMONN, Tang et al. 2023).

    features [n, d_v] ─► windows of ``window`` vectors ─► one Q-Former at each ─► tokens in turn

An item becomes ``tokens`` for each window, the last one as short as the item leaves it: the length
of a sound is kept, and its order, where one Q-Former over all would lose both (arXiv 2310.13289).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cfm_train.config.types import Positive
from cfm_train.modality.connectors.qformer import QFormer


class WindowQFormer(QFormer):
    """A Q-Former over windows.

    Args:
        window: feature vectors of a window.
        tokens: learned queries, the tokens that every window becomes.
        layers: how many layers.
        every: cross-attention stands in each layer whose number, from 0, this divides.
        inner: width of the queries.
        heads: attention heads; divides the width.
        ff: width inside the feed-forward.
    """

    def __init__(
        self,
        window: Positive,
        tokens: Positive,
        layers: Positive,
        every: Positive,
        inner: Positive,
        heads: Positive,
        ff: Positive,
    ) -> None:
        super().__init__(tokens, layers, every, inner, heads, ff)
        self.window = window

    def count(self, n: int) -> int:
        """``tokens`` for each window, a last short one included."""
        return -(-n // self.window) * self.tokens

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """See `Connector.forward`; what is there of an item lies in front of what is not."""
        items, n = mask.shape
        windows = -(-n // self.window)
        lacking = windows * self.window - n
        features = F.pad(features, (0, 0, 0, lacking)).reshape(-1, self.window, features.shape[-1])
        inside = F.pad(mask, (0, lacking)).reshape(-1, self.window)
        held = inside.any(dim=1)
        # A window of a shorter item holds nothing: it is asked all the same, and not said.
        asked = self.leave(self.asked(features, inside | ~held[:, None]))
        there = torch.repeat_interleave(held.view(items, windows), self.tokens, dim=1)
        return asked.reshape(items, windows * self.tokens, -1), there
