"""Q-Former: learned queries ask an encoder's features (BLIP-2, Li et al. 2023, arXiv 2301.12597).

    z = LN(queries)
    z ← LN(z + SelfAttention(z))
    z ← LN(z + CrossAttention(q = z, kv = v))      in every ``every``-th layer, the first on
    z ← LN(z + FF(z)),   repeated;   h = W z

A BERT whose text is the queries: normalised behind each part, not before. BLIP-2's own starts from
BERT's weights and is taught to pair images with texts before a language model is there; this one
starts from nothing and learns from the language model alone.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfm_train.config.types import Positive
from cfm_train.modality.connectors.connector import Connector, projection
from cfm_train.modality.fitting import check_heads

#: What BERT adds to a variance before its root is taken, and the deviation of its first weights.
EPSILON, DEVIATION = 1e-12, 0.02


class QFormer(Connector):
    """A querying transformer.

    Args:
        tokens: learned queries, the tokens that every item becomes.
        layers: how many layers.
        every: cross-attention stands in each layer whose number, from 0, this divides.
        inner: width of the queries.
        heads: attention heads; divides the width.
        ff: width inside the feed-forward.
    """

    def __init__(
        self,
        tokens: Positive,
        layers: Positive,
        every: Positive,
        inner: Positive,
        heads: Positive,
        ff: Positive,
    ) -> None:
        super().__init__()
        check_heads(inner, heads)
        self.tokens, self.layers, self.every = tokens, layers, every
        self.inner, self.heads, self.ff = inner, heads, ff

    def build(self, width: int, hidden: int, scale: float) -> Self:
        """Queries, layers, and a map into the language model."""
        self.queries = nn.Parameter(DEVIATION * torch.randn(self.tokens, self.inner))
        self.norm = nn.LayerNorm(self.inner, eps=EPSILON)
        self.stack = nn.ModuleList(
            _Layer(self.inner, self.heads, self.ff, width if at % self.every == 0 else None)
            for at in range(self.layers)
        )
        self.leave = projection(self.inner, hidden, scale)
        return self

    def count(self, n: int) -> int:
        """``tokens``, however many vectors there are."""
        return self.tokens

    def asked(self, features: Tensor, mask: Tensor) -> Tensor:
        """What the queries become: ``[items, tokens, inner]``.

        Args:
            features: ``[items, n, d_v]``; of no item all are missing.
            mask: bool ``[items, n]``.
        """
        z: Tensor = self.norm(self.queries).expand(len(features), -1, -1)
        for layer in self.stack:
            z = layer(z, features, mask)
        return z

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """See `Connector.forward`."""
        tokens = self.leave(self.asked(features, mask))
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=mask.device)


class _Layer(nn.Module):
    """Queries among themselves, then the features (width None: not here), then a feed-forward."""

    def __init__(self, inner: int, heads: int, ff: int, width: int | None) -> None:
        super().__init__()
        self.among = _Attention(inner, inner, heads)
        self.across = None if width is None else _Attention(inner, width, heads)
        self.up, self.down = _linear(inner, ff), _linear(ff, inner)
        self.norm = nn.LayerNorm(inner, eps=EPSILON)

    def forward(self, z: Tensor, v: Tensor, there: Tensor) -> Tensor:
        """Queries ``[items, tokens, inner]`` after one layer."""
        z = self.among(z, z, None)
        if self.across is not None:
            z = self.across(z, v, there[:, None, None])
        found: Tensor = self.norm(z + self.down(F.gelu(self.up(z))))
        return found


class _Attention(nn.Module):
    """``LN(z + O softmax(Q z · K v) V v)``."""

    def __init__(self, inner: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.o = _linear(inner, inner), _linear(inner, inner)
        self.k, self.v = _linear(width, inner), _linear(width, inner)
        self.norm = nn.LayerNorm(inner, eps=EPSILON)

    def forward(self, z: Tensor, seen: Tensor, there: Tensor | None) -> Tensor:
        """Queries ``[items, tokens, inner]`` after they have asked ``seen``."""
        q, k, v = (self._split(x) for x in (self.q(z), self.k(seen), self.v(seen)))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=there)
        found: Tensor = self.norm(z + self.o(mixed.transpose(1, 2).flatten(2)))
        return found

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _linear(width: int, out: int) -> nn.Linear:
    """A linear map as BERT starts it."""
    linear = nn.Linear(width, out)
    nn.init.normal_(linear.weight, std=DEVIATION)
    nn.init.zeros_(linear.bias)
    return linear
