"""TSV-Merge against the paper's algorithm with whole decompositions, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.merging.merges import combined, low_rank_updates, random_updates, relative


def reference(updates: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """The first ⌊min/N⌋ triplets of each, decorrelated by the polar factor (U Uᵀ…)^-½ U."""
    keep = min(updates.shape[1:]) // len(updates)
    left, middle, right = [], [], []
    for update, weight in zip(updates.numpy(), weights, strict=True):
        U, S, Vh = np.linalg.svd(weight * update, full_matrices=False)
        left.append(U[:, :keep])
        middle.append(S[:keep])
        right.append(Vh[:keep].T)

    def decorrelated(parts: list[np.ndarray]) -> np.ndarray:
        X = np.concatenate(parts, axis=1)
        values, vectors = np.linalg.eigh(X.T @ X)
        return X @ (vectors / np.sqrt(values)) @ vectors.T

    return torch.from_numpy(
        decorrelated(left) @ np.diag(np.concatenate(middle)) @ decorrelated(right).T
    )


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 1.5, -0.7]])
def test_the_paper(shape: tuple[int, int], weights: list[float]) -> None:
    updates = random_updates(3, *shape)
    assert relative(combined("tsv", updates, weights), reference(updates, weights)) < 1e-9
    single = combined("tsv", updates.float(), weights, scale=0.4)
    assert relative(single, 0.4 * reference(updates, weights)) < 1e-5


def test_low_rank_updates_have_no_vectors_beyond_their_rank() -> None:
    updates = low_rank_updates(2, 2, 8, 10)
    found = combined("tsv", updates.float())
    assert torch.linalg.matrix_rank(found.double(), rtol=1e-5) == 4
    # The kept triplets are all there are, so the answer is that of the exact rank.
    left, right = [], []
    total = []
    for update in updates:
        U, S, Vh = torch.linalg.svd(update)
        left.append(U[:, :2])
        total.append(S[:2])
        right.append(Vh[:2].T)
    outer, inner = (torch.cat(parts, dim=1) for parts in (left, right))

    def polar(X: torch.Tensor) -> torch.Tensor:
        U, _, Vh = torch.linalg.svd(X, full_matrices=False)
        return U @ Vh

    expected = polar(outer) @ torch.diag(torch.cat(total)) @ polar(inner).T
    assert relative(found, expected) < 1e-5


def test_one_alone_twins_and_vectors() -> None:
    update = random_updates(1, 5, 8)
    assert relative(combined("tsv", update), update[0]) < 1e-12
    low = low_rank_updates(1, 2, 8, 10)[0]
    assert relative(combined("tsv", torch.stack([low, low])), low) < 1e-9
    vectors = random_updates(3, 7)
    assert relative(combined("tsv", vectors), vectors.mean(0)) < 1e-12
    assert not combined("tsv", torch.zeros(2, 4, 4)).any()
