"""The checksum of tensors in memory: it sees every bit, every place and every name."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cfm_train.backbone.checksum import _WORDS, _sums, _weights, checksum


def module(**tensors: Tensor) -> nn.Module:
    result = nn.Module()
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            result.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            result.register_buffer(name, tensor)
    return result


def naive(tensor: Tensor) -> list[int]:
    """The formula in Python's whole numbers."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    data += bytes(-len(data) % 4)
    words = [int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, len(data), 4)]
    weights = _weights(torch.device("cpu")).tolist()
    sums = []
    for start in range(0, len(words), _WORDS):
        block = words[start : start + _WORDS]
        total = sum(x * w for x, w in zip(block, weights, strict=False)) % (1 << 64)
        sums.append(total - (1 << 64) if total >= 1 << 63 else total)
    return sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 3, 1000, _WORDS + 5, 5 * _WORDS])
def test_sums_are_those_of_the_formula(dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(count)
    tensor = (torch.randn(count) * 50).to(dtype)
    assert _sums(tensor).tolist() == naive(tensor)


def test_weights_are_as_the_proof_needs_them() -> None:
    weights = _weights(torch.device("cpu"))
    low = weights & 0xFFFFFFFF
    assert bool((weights % 2 == 1).all())
    assert len(low.unique()) == _WORDS
    assert int(low.max()) < 1 << 17


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2 * _WORDS + 99), st.integers(0, 15), st.sampled_from(["bfloat16", "float32"])
)
def test_every_bit_counts(element: int, bit: int, dtype: str) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(2 * _WORDS + 100).to(getattr(torch, dtype))
    before = checksum(module(weight=tensor))
    tensor.view(torch.int16)[element] ^= -(1 << 15) if bit == 15 else 1 << bit
    assert checksum(module(weight=tensor)) != before


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3 * _WORDS - 1), st.integers(0, 3 * _WORDS - 1), st.booleans())
def test_every_place_counts(i: int, j: int, opposite: bool) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(3 * _WORDS)
    if opposite:  # words that differ in their highest bit only
        tensor[j] = -tensor[i]
    swapped = tensor.clone()
    swapped[i], swapped[j] = tensor[j].clone(), tensor[i].clone()
    same = checksum(module(weight=tensor)) == checksum(module(weight=swapped))
    assert same == torch.equal(tensor, swapped)


def test_zero_and_minus_zero_differ() -> None:
    tensors = torch.zeros(3), torch.tensor([0.0, -0.0, 0.0])
    assert checksum(module(weight=tensors[0])) != checksum(module(weight=tensors[1]))


def test_names_shapes_and_dtypes_count() -> None:
    zeros = torch.zeros(4, 6)
    sums = {
        checksum(module(a=zeros)),
        checksum(module(b=zeros)),
        checksum(module(a=zeros.reshape(6, 4))),
        checksum(module(a=zeros.to(torch.float64))),
        checksum(module(a=zeros, b=zeros)),
        checksum(module(a=zeros, flag=torch.tensor([True, False, True]))),
        checksum(module(a=zeros, flag=torch.tensor([True, True, False]))),
    }
    assert len(sums) == 7


def test_layout_in_memory_does_not_count() -> None:
    weight = torch.randn(64, 32)
    assert checksum(module(w=weight)) == checksum(module(w=weight.T.contiguous().T))


def test_reading_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    before = copy.deepcopy(model.state_dict())
    assert checksum(model) == checksum(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_quick() -> None:
    """A 90 MB model takes a fraction of a second, or it would not be taken for every run."""
    model = module(weight=torch.randn(22_700_000))
    checksum(model)
    start = time.process_time()
    checksum(model)
    assert time.process_time() - start < 1.0
