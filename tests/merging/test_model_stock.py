"""Model Stock against mergekit and the paper's ratio."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.merging.merges import combined, mergekit, random_updates, relative


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("shape", [(9,), (4, 6)])
def test_equals_mergekit(count: int, shape: tuple[int, ...]) -> None:
    updates = random_updates(count, *shape) + 0.5
    assert relative(combined("model_stock", updates), mergekit("model_stock", updates)) < 1e-6


def test_the_ratio_of_the_paper() -> None:
    updates = random_updates(3, 12, seed=2) + 0.5
    pairs = itertools.combinations(updates, 2)
    cosine = sum(float(a @ b / (a.norm() * b.norm())) for a, b in pairs) / 3
    ratio = 3 * cosine / (1 + 2 * cosine)
    assert relative(combined("model_stock", updates), ratio * updates.mean(0)) < 1e-12


def test_the_bounds_and_small_updates() -> None:
    one = random_updates(1, 6)[0]
    assert relative(combined("model_stock", torch.stack([one, one])), one) < 1e-12
    assert not combined("model_stock", torch.eye(4).double()).any()
    opposite = torch.stack([one, -one * (1 + 1e-9)])
    assert not combined("model_stock", opposite).any()
    updates = random_updates(3, 12) + 0.5
    small = combined("model_stock", updates * 1e-6) * 1e6
    assert relative(small, combined("model_stock", updates)) < 1e-12
    with_nothing = combined("model_stock", torch.stack([one, one, 0 * one]))
    ratio = 3 * (1 / 3) / (1 + 2 / 3)
    assert with_nothing.norm().item() == pytest.approx(ratio * 2 / 3 * one.norm().item())
    assert math.isfinite(with_nothing.sum().item())
