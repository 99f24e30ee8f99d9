"""WUDI against least squares, autograd and Adam of PyTorch."""

from __future__ import annotations

import pytest
import torch

from tests.merging.merges import combined, low_rank_updates, random_updates, relative


def loss(merged: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    """The paper's loss, as it stands there."""
    return sum(  # type: ignore[return-value]
        (((merged - one) @ one.T) ** 2).sum() / (one**2).sum() for one in updates
    )


@pytest.mark.parametrize("shape", [(3, 9), (9, 5)])
def test_it_is_the_minimum_nearest_to_the_sum(shape: tuple[int, int]) -> None:
    updates = random_updates(2, *shape)
    # vec(τ Gᵢ) in one system of equations: least squares gives the nearest to the start.
    start = updates.sum(0)
    roots = [one / one.norm() for one in updates]
    system = torch.cat(roots)  # [N·out, in]: τ systemᵀ = [τᵢ rootᵢᵀ …]
    target = torch.cat([one @ root.T for one, root in zip(updates, roots, strict=True)], dim=1)
    step = torch.linalg.lstsq(system, (target - start @ system.T).T, driver="gelsd").solution.T
    found = combined("wudi", updates)
    assert relative(found, start + step) < 1e-9
    assert relative(combined("wudi", updates.float()), start + step) < 1e-5
    merged = found.clone().requires_grad_(True)
    loss(merged, updates).backward()
    assert merged.grad is not None and merged.grad.abs().max() < 1e-10


def test_inputs_that_do_not_meet_keep_their_outputs() -> None:
    updates = low_rank_updates(2, 2, 6, 12).float()
    found = combined("wudi", updates)
    for one in updates:
        assert relative(found @ one.T, one @ one.T) < 1e-4
    assert torch.linalg.matrix_rank(found.double(), rtol=1e-5) == 4


def test_adam_from_the_sum_as_in_the_paper() -> None:
    updates = random_updates(3, 4, 6)
    merged = torch.nn.Parameter(updates.sum(0))
    adam = torch.optim.Adam([merged], lr=1e-3)
    for _ in range(50):
        adam.zero_grad()
        loss(merged, updates).backward()
        adam.step()
    found = combined("wudi", updates, steps=50, learning_rate=1e-3)
    assert relative(found, merged.detach()) < 1e-10
    assert (
        loss(combined("wudi", updates), updates)
        < loss(found, updates)
        < loss(updates.sum(0), updates)
    )


def test_zeros_and_vectors() -> None:
    one = random_updates(1, 4, 6)[0]
    assert relative(combined("wudi", torch.stack([one, 0 * one])), one) < 1e-9
    assert not combined("wudi", torch.zeros(2, 4, 6)).any()
    vectors = random_updates(3, 7)
    assert relative(combined("wudi", vectors), vectors.mean(0)) < 1e-12
