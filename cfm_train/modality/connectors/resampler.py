"""Perceiver resampler: any number of features becomes a fixed number of tokens (Flamingo, 2022).

    z ← z + CrossAttention(q = z, kv = [v; z]),   z ← z + FF(z),   repeated;   h = W z

z are learned latents. Features that are not there are masked out.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfm_train.config.types import Positive
from cfm_train.modality.connectors.connector import Connector, projection
from cfm_train.modality.fitting import check_heads


class Resampler(Connector):
    """A perceiver resampler.

    Args:
        tokens: learned latents, the tokens that every item becomes.
        depth: how many rounds.
        inner: width of the latents.
        heads: attention heads; divides the width.
    """

    def __init__(self, tokens: Positive, depth: Positive, inner: Positive, heads: Positive) -> None:
        super().__init__()
        check_heads(inner, heads)
        self.tokens, self.depth, self.inner, self.heads = tokens, depth, inner, heads

    def build(self, width: int, hidden: int, scale: float) -> Self:
        """Latents, a map into their width, the rounds, and a map out of it."""
        self.latents = nn.Parameter(torch.randn(self.tokens, self.inner))
        self.enter = projection(width, self.inner, 1.0)
        self.rounds = nn.ModuleList(_Round(self.inner, self.heads) for _ in range(self.depth))
        self.norm = nn.LayerNorm(self.inner)
        self.leave = projection(self.inner, hidden, scale)
        return self

    def count(self, n: int) -> int:
        """``tokens``, however many vectors there are."""
        return self.tokens

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """See `Connector.forward`."""
        items = len(features)
        seen = self.enter(features)
        z = self.latents.expand(items, -1, -1)
        own = torch.ones(items, self.tokens, dtype=torch.bool, device=mask.device)
        there = torch.cat([mask, own], dim=1)
        for one in self.rounds:
            z = one(z, seen, there)
        return self.leave(self.norm(z)), own


class _Round(nn.Module):
    """Cross-attention over features and latents, and a feed-forward; normalised before each."""

    def __init__(self, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_z, self.norm_v, self.norm_f = (nn.LayerNorm(inner) for _ in range(3))
        self.q, self.kv = nn.Linear(inner, inner), nn.Linear(inner, 2 * inner)
        self.o = nn.Linear(inner, inner)
        self.up, self.down = nn.Linear(inner, 2 * inner), nn.Linear(2 * inner, inner)

    def forward(self, z: Tensor, v: Tensor, there: Tensor) -> Tensor:
        """Latents ``[items, tokens, inner]`` after one round."""
        normed = self.norm_z(z)
        k, w = self.kv(torch.cat([self.norm_v(v), normed], dim=1)).chunk(2, dim=-1)
        q, k, w = (self._split(x) for x in (self.q(normed), k, w))
        mixed = F.scaled_dot_product_attention(q, k, w, attn_mask=there[:, None, None])
        z = z + self.o(mixed.transpose(1, 2).flatten(2))
        return z + self.down(F.gelu(self.up(self.norm_f(z))))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
