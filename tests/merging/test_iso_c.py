"""Iso-C against a whole decomposition of the sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.merging.merges import combined, low_rank_updates, random_updates, relative


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 1.5, -0.7]])
def test_the_paper(shape: tuple[int, int], weights: list[float]) -> None:
    updates = random_updates(3, *shape)
    total = np.tensordot(weights, updates.numpy(), 1)
    U, S, Vh = np.linalg.svd(total, full_matrices=False)
    expected = torch.from_numpy(S.mean() * U @ Vh)
    assert relative(combined("iso_c", updates, weights), expected) < 1e-10
    assert relative(combined("iso_c", updates.float(), weights, scale=0.5), 0.5 * expected) < 1e-5


def test_directions_that_are_rounding_are_not_blown_up() -> None:
    updates = low_rank_updates(2, 2, 8, 10)
    found = combined("iso_c", updates.float()).double()
    U, S, Vh = torch.linalg.svd(updates.sum(0))
    assert relative(found, S[:4].mean() * U[:, :4] @ Vh[:4]) < 1e-5
    spectrum = torch.linalg.svdvals(found)
    torch.testing.assert_close(spectrum[:4], S[:4].mean().expand(4), rtol=1e-5, atol=0)
    assert spectrum[4] < 1e-5


def test_bases_of_the_core_do_not_matter() -> None:
    updates = low_rank_updates(2, 2, 8, 10).float().double()
    left, right = (torch.linalg.qr(random_updates(1, n, n, seed=5)[0]).Q for n in (8, 10))
    turned = combined("iso_c", left @ updates @ right)
    assert relative(turned, left @ combined("iso_c", updates) @ right) < 1e-6


def test_cancelled_updates_and_vectors() -> None:
    one = random_updates(1, 5, 8)[0]
    assert not combined("iso_c", torch.stack([one, -one])).any()
    vectors = random_updates(3, 7)
    assert relative(combined("iso_c", vectors), vectors.mean(0)) < 1e-12
