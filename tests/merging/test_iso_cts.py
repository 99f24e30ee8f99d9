"""Iso-CTS against the paper's algorithm with whole decompositions, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.merging.merges import combined, low_rank_updates, random_updates, relative


def reference(updates: torch.Tensor, fraction: float, rank: int | None = None) -> torch.Tensor:
    """Common directions of the sum, then each task's own, whitened, one value for all."""
    found = updates.numpy()
    count = len(found)
    rank = rank or min(found.shape[1:])
    own = round((rank - int(rank * fraction)) / count)
    common = rank - own * count
    U, S, Vh = np.linalg.svd(found.sum(0), full_matrices=False)
    lefts, rights, values = [U[:, :common]], [Vh[:common].T], list(S[:common])
    for update in found:
        u, s, vh = np.linalg.svd(update - U[:, :common] @ U[:, :common].T @ update)
        lefts.append(u[:, :own])
        rights.append(vh[:own].T)
        values += list(s[:own])

    def white(parts: list[np.ndarray]) -> np.ndarray:
        u, _, vh = np.linalg.svd(np.concatenate(parts, axis=1), full_matrices=False)
        return u @ vh

    return torch.from_numpy(np.mean(values) * white(lefts) @ white(rights).T)


@pytest.mark.parametrize("shape", [(10, 12), (12, 10), (9, 9)])
@pytest.mark.parametrize("fraction", [0.8, 0.4])
def test_the_paper(shape: tuple[int, int], fraction: float) -> None:
    updates = random_updates(3, *shape)
    found = combined("iso_cts", updates, common_space_fraction=fraction)
    assert relative(found, reference(updates, fraction)) < 1e-9
    found = combined("iso_cts", updates.float(), common_space_fraction=fraction, scale=1.5)
    assert relative(found, 1.5 * reference(updates, fraction)) < 1e-5


def test_weights_multiply_the_updates() -> None:
    updates, weights = random_updates(3, 10, 12), [0.5, 1.5, -0.7]
    weighted = updates * torch.tensor(weights, dtype=torch.float64).view(3, 1, 1)
    assert relative(combined("iso_cts", updates, weights), combined("iso_cts", weighted)) < 1e-12


def test_low_rank_updates_have_as_many_directions_as_their_sum() -> None:
    updates = low_rank_updates(3, 4, 20, 24)
    found = combined("iso_cts", updates.float())
    assert relative(found, reference(updates, 0.8, rank=12)) < 1e-4
    assert torch.linalg.matrix_rank(found.double(), rtol=1e-5) == 12


def test_all_common_is_iso_c_and_degenerate_updates() -> None:
    updates = random_updates(3, 10, 12)
    whole = combined("iso_cts", updates, common_space_fraction=1.0)
    assert relative(whole, combined("iso_c", updates)) < 1e-10
    one = random_updates(1, 8, 9)[0]
    assert combined("iso_cts", torch.stack([one, one, one])).isfinite().all()
    assert combined("iso_cts", updates, common_space_fraction=0.0).isfinite().all()
    assert not combined("iso_cts", torch.zeros(2, 4, 4)).any()
