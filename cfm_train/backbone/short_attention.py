"""Attention for training on short rows on a CPU in half precision.

PyTorch's fused CPU attention has a slow backward pass in bfloat16. Forward and backward of about
1,024 tokens in 12 heads of width 32, on one thread of an AMD EPYC: in rows of 26 tokens it takes
seven times as long as the plain formula, of 128 three times, of 256 about as long.
So where gradients flow through short rows, the formula is computed as it is written:

    softmax(q kᵀ · scale + bias, masked) v          (Vaswani et al. 2017, arXiv 1706.03762)

with the softmax in float32. Without gradients the fused kernel runs, so that inference is
transformers' own to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv

#: Longest row of keys, in tokens, for which the plain formula is faster (measured, see above).
LONGEST = 256


def is_worth_it(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether the plain formula is the faster one here."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)
        and key.shape[2] <= LONGEST
        and dropout == 0
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
    )


def short_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None,
    is_causal: bool | None,
    position_bias: Tensor | None,
) -> Tensor:
    """Attention by the formula.

    Args:
        module: the attention module (its number of query heads for each key head, its causality).
        query: ``[batch, heads, q, dim]``.
        key, value: ``[batch, kv_heads, k, dim]``.
        attention_mask: None, bool (True = sees) or additive, broadcast to ``[batch, heads, q, k]``.
        scaling: factor on the scores; None for ``1 / sqrt(dim)``.
        is_causal: whether a missing mask means a causal one; None asks the module.
        position_bias: ``[1 or batch, heads, q, k]`` added to the scores, or None.

    Returns:
        ``[batch, q, heads, dim]``.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    q_length, k_length = query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query * scale, key.transpose(2, 3)).float()  # [batch, heads, q, k]
    if position_bias is not None:
        scores = scores + position_bias.float()
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and q_length > 1:
        # As transformers has it: an empty static cache behind the tokens is not seen.
        attention_mask = torch.ones(q_length, k_length, dtype=torch.bool).tril()
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(torch.float32).min)
        else:
            scores = scores + attention_mask.float()
    mixed = torch.matmul(scores.softmax(dim=-1).to(value.dtype), value)
    return mixed.transpose(1, 2).contiguous()
