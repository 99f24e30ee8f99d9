"""Gated cross-attention: items are looked at from inside the layers (Flamingo, 2022).

    features ─► resampler ─► v [tokens, inner]                                for each item
    h ← h + tanh(α) · CrossAttention(LN(h), v)      behind every ``every``-th layer of the backbone
    h ← h + tanh(β) · FF(LN(h))

Gates α and β start at zero, so a new connector changes no logit, with items there or not. An item
takes one token of the text, its mark: a learned embedding that starts as that of the backbone's
first token. Each token looks at all items whose marks stand at or before it; a token that has none
before it stays what it was, to the bit (Alayrac et al. 2022, arXiv 2204.14198).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfm_train.backbone.plugs import Call, Out, Plug
from cfm_train.config.types import Positive
from cfm_train.modality.connectors.connector import Connector
from cfm_train.modality.connectors.resampler import Resampler
from cfm_train.modality.fitting import check_layers
from cfm_train.modality.sight import Sight

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


class GatedCrossAttention(Connector):
    """A resampler, and cross-attention with gates behind some layers.

    Args:
        tokens: latents that an item is resampled to; they take no place in the text.
        depth: rounds of the resampler.
        inner: width of the latents and of attention.
        heads: attention heads; divides the width.
        every: behind each layer whose number, from 1, this divides.
    """

    def __init__(
        self, tokens: Positive, depth: Positive, inner: Positive, heads: Positive, every: Positive
    ) -> None:
        super().__init__()
        self.resampler = Resampler(tokens, depth, inner, heads)
        self.inner, self.heads, self.every = inner, heads, every
        self.sight = Sight()

    def build(self, width: int, hidden: int, scale: float) -> Self:
        """The resampler and the mark; `attach` makes the rest."""
        self.resampler.build(width, self.inner, 1.0)
        self.mark = nn.Parameter(torch.zeros(hidden))
        return self

    def attach(self, backbone: Backbone) -> tuple[str, ...]:
        """One gated block for each chosen layer.

        Raises:
            UserError: no layer is chosen.
        """
        layers = backbone.sites.layers[""]
        check_layers(self.every, layers)
        names = tuple(f"layer.{i}" for i in range(layers) if (i + 1) % self.every == 0)
        self.blocks = nn.ModuleList(
            _Gated(backbone.sites[name].out_features, self.inner, self.heads) for name in names
        )
        self.names = names
        with torch.no_grad():
            embed = backbone.model.get_submodule(backbone.sites["embed"].module)
            first = torch.tensor([first_token(backbone)], device=backbone.device)
            self.mark.copy_(embed(first)[0])
        return names

    def count(self, n: int) -> int:
        """One mark, however many vectors there are."""
        return 1

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The marks of some items, see `Connector.forward`; their latents are kept for the layers.

        What is looked at in a pass is what was resampled last.
        """
        self.sight.latents = self.resampler(features, mask)[0]
        marks = self.mark.expand(len(features), 1, -1)
        return marks, torch.ones(marks.shape[:2], dtype=torch.bool, device=mask.device)

    def look(self, here: Tensor | None, past: int, items: list[int], tags: int) -> None:
        """Notes which items each token of the pass that begins has before it."""
        self.sight.look(here, past, items, 1 + tags)

    def plugs(self) -> Iterable[Plug]:
        """One plug behind each chosen layer."""
        for name, block in zip(self.names, self.blocks, strict=True):
            yield Out(name, functools.partial(self._see, block))

    def _see(self, block: nn.Module, call: Call) -> Tensor:
        h = call.y
        assert h is not None
        seen = self.sight.of(h.shape[0], h.shape[1])
        if seen is None:
            return h
        latents, visible = seen
        some = visible.any(dim=-1)
        # A token without items looks at all and is put back: a softmax over nothing is no number.
        moved = h + block(h.float(), latents, visible | ~some[..., None]).to(h.dtype)
        return torch.where(some[..., None], moved, h)


class _Gated(nn.Module):
    """What one layer adds: cross-attention and a feed-forward, each behind a gate."""

    def __init__(self, hidden: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_h, self.norm_f = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.norm_v = nn.LayerNorm(inner)
        self.q, self.kv = nn.Linear(hidden, inner), nn.Linear(inner, 2 * inner)
        self.o = nn.Linear(inner, hidden)
        self.up, self.down = nn.Linear(hidden, 2 * inner), nn.Linear(2 * inner, hidden)
        self.gate, self.gate_f = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, h: Tensor, latents: Tensor, visible: Tensor) -> Tensor:
        """What is added to hidden states.

        Args:
            h: float32 ``[rows, seq, hidden]``.
            latents: ``[rows, m, inner]``.
            visible: bool ``[rows, seq, m]``; each token has one at least.
        """
        k, v = self.kv(self.norm_v(latents)).chunk(2, dim=-1)
        q, k, v = (self._split(x) for x in (self.q(self.norm_h(h)), k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None])
        added = self.gate.tanh() * self.o(mixed.transpose(1, 2).flatten(2))
        fed = self.down(F.gelu(self.up(self.norm_f(h + added))))
        return added + self.gate_f.tanh() * fed

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def first_token(backbone: Backbone) -> int:
    """The token that a text of the backbone begins with; the one that ends it where it has none."""
    tokenizer = backbone.tokenizer
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return int(next((one for one in ids if one is not None), 0))
