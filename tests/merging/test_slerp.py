"""SLERP against mergekit, a loop, and the geometry of the sphere."""

from __future__ import annotations

import math

import pytest
import torch

from cfm_train.errors import UserError
from tests.merging.merges import combined, random_updates, relative


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0, 1.3])
@pytest.mark.parametrize("shape", [(7,), (5, 6)])
def test_equals_mergekit(t: float, shape: tuple[int, ...]) -> None:
    from mergekit.merge_methods.api import merge_tensors

    updates = random_updates(2, *shape)
    theirs = merge_tensors(list(updates), "slerp", parameters={"t": t}, base_index=0)
    assert relative(combined("slerp", updates, [1 - t, t]), theirs) < 1e-6


def test_the_formula_in_plain_numbers() -> None:
    updates = random_updates(2, 9)
    a, b = updates.tolist()
    length = [math.sqrt(sum(x * x for x in v)) for v in (a, b)]
    angle = math.acos(sum(x * y for x, y in zip(a, b, strict=True)) / (length[0] * length[1]))
    t = 0.75 / (0.25 + 0.75)
    expected = [
        math.sin((1 - t) * angle) / math.sin(angle) * x + math.sin(t * angle) / math.sin(angle) * y
        for x, y in zip(a, b, strict=True)
    ]
    found = combined("slerp", updates, [0.25, 0.75])
    assert relative(found, torch.tensor(expected, dtype=torch.float64)) < 1e-12


def test_weights_are_shares_and_the_arc_keeps_the_length() -> None:
    one, two = random_updates(2, 50)
    updates = torch.stack([one / one.norm(), two / two.norm()])
    found = combined("slerp", updates, [1, 3])
    assert relative(found, combined("slerp", updates, [0.25, 0.75])) < 1e-14
    assert found.norm().item() == pytest.approx(1, abs=1e-12)
    with pytest.raises(UserError, match="add up to zero"):
        combined("slerp", updates, [1, -1])


@pytest.mark.parametrize("factor", [3.0, -3.0])
def test_parallel_updates_are_on_a_line(factor: float) -> None:
    one = random_updates(1, 8)[0]
    updates = torch.stack([one, factor * one])
    assert relative(combined("slerp", updates, [0.25, 0.75]), (0.25 + 0.75 * factor) * one) < 1e-12


def test_from_the_threshold_on_it_is_linear() -> None:
    updates = torch.tensor([[1, 0], [math.cos(0.1), math.sin(0.1)]], dtype=torch.float64)
    straight = updates.mean(0)
    assert relative(combined("slerp", updates, dot_threshold=0.99), straight) < 1e-12
    assert combined("slerp", updates, dot_threshold=0.999).norm() == pytest.approx(1, abs=1e-12)


def test_an_update_of_zeros_has_no_direction() -> None:
    one = random_updates(1, 4)[0]
    found = combined("slerp", torch.stack([one, 0 * one]), [0.5, 0.5])
    assert found.isfinite().all() and relative(found, math.sin(math.pi / 4) * one) < 1e-12


def test_it_takes_two() -> None:
    with pytest.raises(UserError, match="takes exactly 2 bricks, and there are 3"):
        combined("slerp", random_updates(3, 4))
