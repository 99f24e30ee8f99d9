"""RegMean against least squares on the inputs themselves."""

from __future__ import annotations

import pytest
import torch

from cfm_train.errors import UserError
from tests.merging.merges import combined, random_updates, relative


def inputs(count: int, rows: int, width: int) -> torch.Tensor:
    return torch.randn(
        count, rows, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )


def grams(seen: torch.Tensor) -> list[torch.Tensor]:
    return [x.T @ x for x in seen]


def test_it_is_least_squares_over_all_inputs() -> None:
    updates, seen = random_updates(3, 4, 6), inputs(3, 20, 6)
    weights = torch.tensor([0.5, 0.3, 1.2]).double()
    roots = weights.sqrt()[:, None, None]
    x = (roots * seen).reshape(-1, 6)
    y = (roots * (seen @ updates.mT)).reshape(-1, 4)
    expected = torch.linalg.lstsq(x, y).solution.T
    found = combined("regmean", updates, weights.tolist(), statistics=grams(seen), alpha=1.0)
    assert relative(found, expected) < 1e-10


def test_the_off_diagonals_are_damped() -> None:
    updates, seen = random_updates(3, 4, 6), inputs(3, 20, 6)
    damped = [0.9 * g + 0.1 * torch.diag(torch.diag(g)) for g in grams(seen)]
    above = sum(u @ g for u, g in zip(updates, damped, strict=True))
    expected = above @ torch.linalg.inv(sum(damped))  # type: ignore[arg-type, operator]
    assert relative(combined("regmean", updates, statistics=grams(seen)), expected) < 1e-10


def test_inputs_that_nobody_saw_get_the_mean() -> None:
    updates, seen = random_updates(2, 4, 6), inputs(2, 20, 6)
    seen[:, :, 5] = 0
    found = combined("regmean", updates, [1, 3], statistics=grams(seen), alpha=1.0)
    inner = combined(
        "regmean", updates[:, :, :5].clone(), [1, 3], statistics=grams(seen[:, :, :5]), alpha=1.0
    )
    assert relative(found[:, :5], inner) < 1e-9
    assert relative(found[:, 5], 0.25 * updates[0, :, 5] + 0.75 * updates[1, :, 5]) < 1e-12


def test_float32_updates_are_solved_in_float64() -> None:
    updates, seen = random_updates(3, 4, 6), inputs(3, 20, 6)
    seen[:, :, 1] = seen[:, :, 0] * (1 + 1e-4)
    whole = combined("regmean", updates, statistics=grams(seen))
    found = combined("regmean", updates.float(), statistics=grams(seen))
    assert found.dtype == torch.float32 and relative(found, whole) < 1e-6


def test_vectors_are_averaged_and_wrong_statistics_refused() -> None:
    updates = random_updates(2, 5)
    expected = 0.25 * updates[0] + 0.75 * updates[1]
    assert relative(combined("regmean", updates, [1, 3]), expected) < 1e-12
    with pytest.raises(UserError, match=r"the shape \[5, 5\], and its update has 6 inputs"):
        combined("regmean", random_updates(2, 4, 6), statistics=[torch.eye(5)] * 2)
    with pytest.raises(UserError, match="weights of 0 and more"):
        combined("regmean", random_updates(2, 4, 6), [1, -1], statistics=[torch.eye(6)] * 2)
