"""The attention port: extra keys and values in front of an attention site's own.

transformers calls one function for every attention layer, looked up by name. Ours, ``cfm_sdpa``, is
its SDPA with one step before it: where a brick put keys and values into the site's slot, they are
set in front of the layer's own, for the rows that carry the brick. The cache of generation never
holds them, so unplugging leaves nothing behind, and every architecture gets the port the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "cfm_sdpa"


@dataclass(slots=True)
class KVSlot:
    """What is plugged into one attention module: groups of keys and values ``[tokens, heads, dim]``."""

    groups: list[tuple[Tensor, Tensor, float | Tensor | None]] = field(default_factory=list)

    @classmethod
    def install(cls, module: nn.Module) -> KVSlot:
        """Puts an empty slot on an attention module."""
        slot = cls()
        # Past nn.Module's own __setattr__: the slot is no part of the model.
        object.__setattr__(module, "_cfm_kv", slot)
        return slot

    def add(self, keys: Tensor, values: Tensor, weight: float | Tensor | None) -> None:
        """Adds keys and values; a row whose weight is 0 does not see them."""
        self.groups.append((keys, values, weight))

    def clear(self) -> None:
        """Empties the slot."""
        self.groups = []

    def extend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Keys, values and mask with the plugged ones in front, and how many were put there.

        Args:
            query: ``[batch, heads, q, dim]``.
            key, value: ``[batch, kv_heads, k, dim]``.
            mask: None, bool (True = sees) or additive, ``[batch or 1, 1 or heads, q or 1, k]``.
            causal: whether a missing mask means a causal one.
        """
        batch, _, q_length, _ = query.shape
        k_length = key.shape[2]
        fronts_k, fronts_v, seen = [], [], []
        for keys, values, weight in self.groups:
            fronts_k.append(_rows(keys, batch, key))
            fronts_v.append(_rows(values, batch, value))
            seen.append(_visible(weight, batch, len(keys), key.device))
        front = torch.cat(seen, dim=1)  # [batch, p], True where the row carries the brick
        p = front.shape[1]
        key = torch.cat([*fronts_k, key], dim=2)
        value = torch.cat([*fronts_v, value], dim=2)
        if mask is None and not causal and bool(front.all()):
            return key, value, None, p
        if mask is None:
            own = torch.ones(q_length, k_length, dtype=torch.bool, device=key.device)
            mask = own.tril(k_length - q_length)[None, None] if causal else own[None, None]
        ahead = front[:, None, None, :].expand(batch, mask.shape[1], q_length, p)
        if mask.dtype != torch.bool:
            ahead = torch.zeros(ahead.shape, dtype=mask.dtype, device=mask.device).masked_fill(
                ~ahead, torch.finfo(mask.dtype).min
            )
        mask = mask.expand(batch, mask.shape[1], q_length, k_length)
        return key, value, torch.cat([ahead, mask], dim=-1), p


def _rows(front: Tensor, batch: int, like: Tensor) -> Tensor:
    """``[tokens, heads, dim]`` as ``[batch, heads, tokens, dim]`` in the layer's dtype."""
    front = front.to(device=like.device, dtype=like.dtype).permute(1, 0, 2)
    return front[None].expand(batch, -1, -1, -1)


def _visible(
    weight: float | Tensor | None, batch: int, tokens: int, device: torch.device
) -> Tensor:
    if isinstance(weight, Tensor):
        rows = weight.to(device) != 0
        rows = rows if rows.ndim == 1 else rows.any(dim=1)
        rows = rows.repeat_interleave(batch // rows.shape[0])
    else:
        rows = torch.full((batch,), weight is None or weight != 0, device=device)
    return rows[:, None].expand(batch, tokens)


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
    if slot is not None and slot.groups:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        causal = bool(causal) and query.shape[2] > 1
        key, value, attention_mask, p = slot.extend(query, key, value, attention_mask, causal)
        kwargs["is_causal"] = False
        if kwargs.get("position_bias") is not None:  # T5: no bias towards a virtual position
            kwargs["position_bias"] = nn.functional.pad(kwargs["position_bias"], (p, 0))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, cfm_sdpa)
AttentionMaskInterface.register(NAME, sdpa_mask)
