"""One linear map (Frozen, Tsimpoukelli et al. 2021; LiMBeR, Merullo et al. 2022; LLaVA, 2023).

h = W v + b,  read as ``tokens`` tokens of width d for each feature vector
"""

from __future__ import annotations

from typing import Self

from torch import Tensor

from cfm_train.config.types import Positive
from cfm_train.modality.connectors.connector import Connector, in_turn, projection


class Linear(Connector):
    """A linear map.

    Args:
        tokens: how many tokens each feature vector becomes (Frozen: 2 from one pooled vector).
    """

    def __init__(self, tokens: Positive) -> None:
        super().__init__()
        self.tokens = tokens

    def build(self, width: int, hidden: int, scale: float) -> Self:
        """One matrix ``[tokens · d, d_v]`` and a bias."""
        self.project = projection(width, self.tokens * hidden, scale)
        return self

    def count(self, n: int) -> int:
        """``n · tokens``."""
        return n * self.tokens

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """See `Connector.forward`."""
        return in_turn(self.project(features), mask, self.tokens)
