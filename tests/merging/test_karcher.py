"""The Karcher mean against mergekit, and as the minimum that it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from cfm_train.errors import UserError
from tests.merging.merges import combined, mergekit, random_updates, relative


@pytest.mark.parametrize("shape", [(5,), (4, 6)])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_equals_mergekit(count: int, shape: tuple[int, ...]) -> None:
    # A common part, so that all lie within one half of the sphere.
    updates = random_updates(count, *shape) + 1.0
    theirs = mergekit("karcher", updates, max_iter=1000, tol=1e-9)
    # mergekit counts the base as one more input, of length zero: it shortens the result.
    assert relative(combined("karcher", updates) * count / (count + 1), theirs) < 1e-6


def test_it_is_the_minimum_of_the_squared_angles() -> None:
    updates = random_updates(3, 3) + 0.7
    shares = np.array([0.5, 0.3, 0.2])
    units = np.stack([(one / one.norm()).numpy() for one in updates])

    def loss(point: np.ndarray) -> float:
        cosines = np.clip(units @ (point / np.linalg.norm(point)), -1, 1)
        return float(shares @ np.arccos(cosines) ** 2)

    best = torch.as_tensor(minimize(loss, units[0], method="Nelder-Mead", tol=1e-12).x)
    found = combined("karcher", updates, shares.tolist())
    length = sum(w * one.norm() for w, one in zip(shares, updates, strict=True))
    assert relative(found, length * best / best.norm()) < 1e-4
    assert found.norm().item() == pytest.approx(float(length))


def test_what_has_no_mean_is_refused() -> None:
    one, two = random_updates(2, 5)
    with pytest.raises(UserError, match="'entry' cancel"):
        combined("karcher", torch.stack([one, -2 * one]))
    with pytest.raises(UserError, match=r"raise merge\.max_iter"):
        combined("karcher", torch.stack([one, two, one + 3 * two]), max_iter=1)
    assert not combined("karcher", torch.zeros(3, 5)).any()
