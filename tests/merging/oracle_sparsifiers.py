"""Sparsifiers after their papers, one function each, in NumPy, float64.

Updates ``X`` and what is drawn for each of their numbers are ``[N, *shape]``.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def ranked(x: Array) -> Array:
    """Positions by falling magnitude; of equal ones the first."""
    return np.argsort(-np.abs(x), kind="stable")


def magnitude(X: Array, draws: Array, density: float, rescale: str) -> Array:
    """The largest of each."""
    return breadcrumbs(X, draws, density, 0.0, rescale)


def breadcrumbs(X: Array, draws: Array, density: float, gamma: float, rescale: str) -> Array:
    """Those between the outliers and the small ones."""
    out = np.zeros_like(X)
    for x, kept in zip(X.reshape(len(X), -1), out.reshape(len(X), -1), strict=True):
        count = max(1, int(density * x.size))
        outliers = min(int(gamma * x.size), x.size - count)
        some = ranked(x)[outliers : outliers + count]
        kept[some] = x[some]
        if rescale == "l1" and kept.any():
            kept *= np.abs(x).sum() / np.abs(kept).sum()
    return out


def dare(X: Array, draws: Array, density: float, rescale: str) -> Array:
    """Those that are drawn."""
    return rescaled(X, draws, np.full_like(X, density), rescale)


def della(X: Array, draws: Array, density: float, epsilon: float, rescale: str) -> Array:
    """Those that are drawn, large ones of a row more often."""
    chance = np.zeros_like(X)
    width = X.shape[-1]
    for row, x in zip(chance.reshape(-1, width), X.reshape(-1, width), strict=True):
        for rank, i in enumerate(np.argsort(np.abs(x), kind="stable")):
            row[i] = density + epsilon * (2 * rank / (width - 1) - 1 if width > 1 else 0)
    return rescaled(X, draws, chance, rescale)


def rescaled(X: Array, draws: Array, chance: Array, rescale: str) -> Array:
    """What is left, by its own probability, or with the norm of the whole."""
    kept = X * (draws < chance)
    if rescale == "inverse":
        return kept / chance
    for x, whole in zip(kept, X, strict=True):
        if rescale == "l1" and x.any():
            x *= np.abs(whole).sum() / np.abs(x).sum()
    return kept


def tall(X: Array, draws: Array, threshold: float, agree: int | None) -> Array:
    """What its own task still finds in the sum."""
    masks = np.stack([np.abs(x) > threshold * np.abs(X.sum(0) - x) for x in X])
    return X * (masks if agree is None else masks.sum(0) >= agree)


SPARSE = {f.__name__: f for f in (magnitude, breadcrumbs, dare, della, tall)}
