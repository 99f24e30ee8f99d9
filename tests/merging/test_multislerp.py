"""Multi-SLERP against mergekit and its closed form."""

from __future__ import annotations

import pytest
import torch

from cfm_train.errors import UserError
from tests.merging.merges import combined, mergekit, random_updates, relative


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 0.3, 0.2], [2.0, 1.0, -0.5]])
@pytest.mark.parametrize("shape", [(9,), (4, 6)])
def test_equals_mergekit(weights: list[float], shape: tuple[int, ...]) -> None:
    updates = random_updates(3, *shape)
    theirs = mergekit("multislerp", updates, weights)
    assert relative(combined("multislerp", updates, weights), theirs) < 1e-6


def test_mean_direction_times_mean_length() -> None:
    updates = random_updates(3, 20)
    shares = [0.5, 0.3, 0.2]
    lengths = [one.norm() for one in updates]
    mean = sum(w * one / n for w, one, n in zip(shares, updates, lengths, strict=True))
    length = sum(w * n for w, n in zip(shares, lengths, strict=True))
    assert isinstance(mean, torch.Tensor)
    assert relative(combined("multislerp", updates, shares), length * mean / mean.norm()) < 1e-12


def test_opposite_directions_have_no_mean() -> None:
    one = random_updates(1, 5)[0]
    with pytest.raises(UserError, match="directions of the updates at 'entry' cancel"):
        combined("multislerp", torch.stack([one, -2 * one]))
    assert not combined("multislerp", torch.zeros(3, 5)).any()
    found = combined("multislerp", torch.stack([one, 0 * one]))
    assert relative(found, one / 2) < 1e-12
