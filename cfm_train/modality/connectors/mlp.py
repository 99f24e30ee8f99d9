"""Two linear maps with a GELU between (LLaVA-1.5's ``mlp2x_gelu``, Liu et al. 2023).

h = W₂ GELU(W₁ v + b₁) + b₂
"""

from __future__ import annotations

from typing import Self

from torch import Tensor
from torch.nn import functional as F

from cfm_train.config.types import Positive
from cfm_train.modality.connectors.connector import Connector, in_turn, projection


class MLP(Connector):
    """A two-layer perceptron.

    Args:
        tokens: how many tokens each feature vector becomes.
        inner: width between the two maps; null for that of the language model.
    """

    def __init__(self, tokens: Positive, inner: Positive | None) -> None:
        super().__init__()
        self.tokens, self.inner = tokens, inner

    def build(self, width: int, hidden: int, scale: float) -> Self:
        """Two matrices with their biases."""
        inner = self.inner or hidden
        self.up = projection(width, inner, 1.0)
        # GELU of a standard normal has a mean square of 0.425.
        self.down = projection(inner, self.tokens * hidden, scale / 0.425**0.5)
        return self

    def count(self, n: int) -> int:
        """``n · tokens``."""
        return n * self.tokens

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """See `Connector.forward`."""
        return in_turn(self.down(F.gelu(self.up(features))), mask, self.tokens)
