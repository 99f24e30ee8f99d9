"""The attention port: extra keys and values in front of an attention site's own.

transformers calls one function for every attention layer, looked up by name. Ours, ``cfm_sdpa``, is
its SDPA with one step before it: where a brick put keys and values into the site's slot, they are
set in front of the layer's own, for the rows that carry the brick. The cache of generation never
holds them, so unplugging leaves nothing behind, and every architecture gets the port the same way.

Where attention has a relative bias (T5), the extra keys get the bias of tokens that lie right
before the sequence, as if they stood in the cache; those at shared positions each by themselves.
Every token sees them, also past the edge of a sliding window. A weight w other than 0 and 1 adds
log w to their scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cfm_train.backbone.short_attention import is_worth_it, short_attention
from cfm_train.backbone.sites import AttentionSite
from cfm_train.backbone.virtual import Members, Source, VirtualTokens, Weight, group, read
from cfm_train.errors import UserError

if TYPE_CHECKING:
    from cfm_train.backbone.stacks import Stack

NAME = "cfm_sdpa"

#: Keys and values ``[batch, kv_heads, tokens, head_dim]`` by the name of their site.
Recorded = dict[str, tuple[Tensor, Tensor]]


@dataclass(slots=True)
class KVSlot:
    """What is plugged into one attention module.

    Attributes:
        site: the module's site.
        stack: the stack of layers that it lies in, None where the model takes no token ids.
        tokens: the plugged keys and values ``[tokens, kv_heads, head_dim]``.
        record: where the layer's own keys and values are noted, None for nowhere.
    """

    site: AttentionSite
    stack: Stack | None
    tokens: VirtualTokens = field(default_factory=VirtualTokens)
    record: Recorded | None = None

    @classmethod
    def install(cls, module: nn.Module, site: AttentionSite, stack: Stack | None) -> KVSlot:
        """Puts an empty slot on an attention module."""
        slot = cls(site, stack)
        # Past nn.Module's own __setattr__: the slot is no part of the model.
        object.__setattr__(module, "_cfm_kv", slot)
        return slot

    @property
    def cross(self) -> bool:
        """Whether the layer attends to another stack, where nothing lies before anything."""
        return self.site.name.endswith(".cross")

    def add(
        self, keys: Source, values: Source, weight: Weight, members: Members | None = None
    ) -> None:
        """Adds keys and values; a row whose weight is 0 does not see them.

        Raises:
            UserError: their shape is not the layer's.
        """
        for name, source in (("keys", keys), ("values", values)):
            with torch.no_grad():
                shape = tuple(read(source).shape)
            if len(shape) != 3 or shape[1] != self.site.kv_heads:
                raise UserError(
                    f"The {name} for '{self.site.name}' have shape {shape}, but the site takes "
                    f"(tokens, {self.site.kv_heads}, head size): the brick is of another backbone."
                )
        added = group((keys, values), weight, members)
        if added is not None:
            self.tokens.add(added)

    def clear(self) -> None:
        """Empties the slot."""
        self.tokens.clear()

    def extend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask with the plugged ones in front.

        Args:
            query: ``[batch, heads, q, head_dim]``.
            key, value: ``[batch, kv_heads, k, head_dim]``.
            mask: None, bool (True = sees) or additive, ``[batch or 1, 1 or heads, q or 1, k]``.
            causal: whether a missing mask means a causal one; then ``q`` equals ``k``.

        Returns:
            ``[batch, kv_heads, p + k, head_dim]`` twice, and the mask (None where all see all).
        """
        batch, _, queries, _ = query.shape
        front_key = self.tokens.gather(0, batch, key).transpose(1, 2)
        front_value = self.tokens.gather(1, batch, value).transpose(1, 2)
        ahead: Tensor | None = None  # [batch, 1 or q, p]: what is seen of the plugged ones
        graded = self.tokens.log_weights(batch, queries, key.device)
        if self.tokens.layout(batch) is not None or graded is not None:
            ahead = self.tokens.seen(batch, key.device)[:, None]
        if graded is not None and ahead is not None:
            ahead = graded.masked_fill(~ahead, torch.finfo(graded.dtype).min)
        if mask is None and (causal or ahead is not None):
            own = torch.ones(queries, key.shape[2], dtype=torch.bool, device=key.device)
            mask = (own.tril() if causal else own)[None, None]
        if mask is not None:
            if ahead is None:
                ahead = mask.new_ones(1, 1, front_key.shape[2], dtype=torch.bool)
            mask = _joined(ahead[:, None], mask, queries, query.dtype)
        return (
            torch.cat([front_key, key], dim=2),
            torch.cat([front_value, value], dim=2),
            mask,
        )

    def bias(self, module: Any, own: Tensor, batch: int) -> Tensor:
        """A relative position bias that covers the plugged keys.

        Args:
            module: the attention module.
            own: the layer's own bias ``[1, heads, q, k]``.
            batch: rows of the batch.

        Returns:
            ``[1 or batch, heads, q, p + k]``.
        """
        p, queries = self.tokens.width(batch), own.shape[2]
        table = module if getattr(module, "has_relative_attention_bias", False) else None
        if table is None and self.stack is not None:
            table = self.stack.relative
        if self.cross or table is None or self.stack is None:
            return nn.functional.pad(own, (p, 0))
        # The queries stand behind virtual tokens and whatever the cache holds; the holes that a
        # prompt of another row leaves in this one do not count. Keys at shared positions all lie
        # right before them, the others behind each other.
        shared = self.site.name in self.stack.shared
        widths = [g.tokens for g in self.tokens.groups] if shared else [p]
        holes, inverse = self.stack.tokens.holes(batch).unique(return_inverse=True)
        past = self.stack.past
        kinds = [
            torch.cat(
                [
                    table.compute_bias(queries, n, device=own.device, past_seen_tokens=n + past - h)
                    for n in widths
                ],
                dim=-1,
            )
            for h in holes.tolist()
        ]
        front = kinds[0] if len(kinds) == 1 else torch.cat(kinds)[inverse.to(own.device)]
        places = self.tokens.layout(batch)
        if shared and places is not None:
            index = (
                places.clamp_min(0)
                .to(own.device)[:, None, None]
                .expand(-1, front.shape[1], queries, -1)
            )
            front = front.expand(batch, -1, -1, -1).gather(3, index)
        own = own.expand(front.shape[0], *own.shape[1:])
        return torch.cat([front.to(own.dtype), own], dim=-1)


def _joined(ahead: Tensor, mask: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    """Two masks side by side; additive where one of them is."""
    if ahead.dtype != mask.dtype:
        ahead, mask = (_additive(part, dtype) for part in (ahead, mask))
    rows, heads = max(ahead.shape[0], mask.shape[0]), mask.shape[1]
    return torch.cat(
        [part.expand(rows, heads, queries, part.shape[-1]) for part in (ahead, mask)], dim=-1
    )


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    lowest = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)
    return mask.clamp_min(lowest).to(dtype)


def cfm_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, with what is plugged into the module's slot in front."""
    slot: KVSlot | None = getattr(module, "_cfm_kv", None)
    if slot is not None and slot.record is not None:
        slot.record[slot.site.name] = (key.detach(), value.detach())
    # Where no row has any of what is plugged, the pass is the bare one.
    if slot is not None and slot.tokens and slot.tokens.width(query.shape[0]):
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        causal = bool(causal) and query.shape[2] > 1
        bias: Tensor | None = kwargs.get("position_bias")
        if attention_mask is None and causal and key.shape[2] > query.shape[2]:
            # An empty static cache behind the tokens: transformers cuts it off here too.
            key, value = (part[:, :, : query.shape[2]] for part in (key, value))
            bias = bias if bias is None else bias[..., : query.shape[2]]
        if bias is not None:
            kwargs["position_bias"] = slot.bias(module, bias, query.shape[0])
        key, value, attention_mask = slot.extend(query, key, value, attention_mask, causal)
        kwargs["is_causal"] = False
    if is_worth_it(query, key, value, kwargs.get("dropout", 0.0)) and not kwargs.get("softcap"):
        short = short_attention(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=kwargs.get("scaling"),
            is_causal=kwargs.get("is_causal"),
            position_bias=kwargs.get("position_bias"),
        )
        return short, None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, cfm_sdpa)
AttentionMaskInterface.register(NAME, sdpa_mask)
