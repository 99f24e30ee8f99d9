"""Attention by the formula against PyTorch's own, in value and in gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cfm_train.backbone.short_attention import LONGEST, is_worth_it, short_attention


def tensors(kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value for 3 rows of 9 tokens and 4 query heads."""
    torch.manual_seed(0)
    shapes = [(3, 4, 9, 16), (3, kv_heads, 9, 16), (3, kv_heads, 9, 16)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_fused_kernel(kv_heads: int, mask: str, causal: bool, bias: bool) -> None:
    """Every mask, grouped heads and a position bias: float32 to 1e-6, gradients too."""
    module = nn.Module()
    module.num_key_value_groups = 4 // kv_heads  # type: ignore[assignment]
    module.is_causal = causal  # type: ignore[assignment]
    seen = torch.ones(3, 1, 9, 9, dtype=torch.bool)
    seen[1, ..., 6:] = False
    given = {
        "none": None,
        "bool": seen,
        "additive": torch.zeros(seen.shape).masked_fill(~seen, -1e30),
    }[mask]
    added = torch.randn(1, 4, 9, 9) if bias else None
    results = []
    for plain in (True, False):
        query, key, value = tensors(kv_heads, torch.float32)
        if plain:
            out = short_attention(
                module,
                query,
                key,
                value,
                given,
                scaling=0.3,
                is_causal=None,
                position_bias=added,
            )
        else:
            out, _ = sdpa_attention_forward(
                module, query, key, value, given, scaling=0.3, position_bias=added
            )
        (out * torch.arange(out.numel()).view(out.shape).sin()).sum().backward()
        results.append((out, query.grad, key.grad, value.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def test_runs_only_where_it_is_faster() -> None:
    """Half precision, short rows, gradients: else the fused kernel."""
    query, key, value = tensors(4, torch.bfloat16)
    assert is_worth_it(query, key, value, 0.0)
    assert not is_worth_it(query, key, value, 0.1)
    with torch.no_grad():
        assert not is_worth_it(query, key, value, 0.0)
    assert not is_worth_it(*tensors(4, torch.float32), 0.0)
    long = torch.zeros(1, 1, LONGEST + 1, 16, dtype=torch.bfloat16, requires_grad=True)
    assert not is_worth_it(long, long, long, 0.0)
