"""Merge rules after their papers, one function each, in NumPy, float64, whole matrices.

Updates ``X`` are ``[N, *shape]``, weights ``w`` ``[N]`` (or, of what goes number by number, of the
shape of ``X``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray


def weighted(X: Array, w: Array) -> Array:
    """``Σ wᵢ Xᵢ``; weights ``[N]``, or one for each number."""
    shaped = w.reshape(w.shape + (1,) * (X.ndim - w.ndim))
    return (X * shaped).sum(0)


def ties(X: Array, w: Array, elect: str, divisor: str) -> Array:
    """Vote, see who agrees, sum those up, divide."""
    w = np.broadcast_to(w.reshape(w.shape + (1,) * (X.ndim - w.ndim)), X.shape)
    vote = {"total": X, "weighted": X * w, "frequency": np.sign(X)}[elect].sum(0)
    sided = X * w if elect == "weighted" else X
    agree = np.where(vote >= 0, sided > 0, sided < 0)
    above = np.where(agree, X * w, 0).sum(0)
    below = {
        "count": agree.sum(0, dtype=float),
        "weights": np.where(agree, w, 0).sum(0),
        "one": np.ones_like(above),
    }[divisor]
    return np.where(below == 0, above, above / np.where(below == 0, 1, below))  # type: ignore[no-any-return]


def magmax(X: Array, w: Array) -> Array:
    """The number of largest magnitude."""
    return np.take_along_axis(X, np.abs(X).argmax(0)[None], 0)[0]


def arc(a: Array, b: Array, t: float, threshold: float) -> Array:
    """From a to b on the arc between them."""
    size = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = np.clip((a * b).sum() / size, -1, 1) if size else 0.0
    if abs(cosine) > threshold or 1 - cosine**2 <= 1e-14:
        return (1 - t) * a + t * b  # type: ignore[no-any-return]
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)  # type: ignore[no-any-return]


def slerp(X: Array, w: Array, dot_threshold: float) -> Array:
    """All as two vectors."""
    return arc(X[0], X[1], w[1] / w.sum(), dot_threshold)


def nuslerp(X: Array, w: Array, along: str) -> Array:
    """Row by row, column by column, or all."""
    t = w[1] / w.sum()
    if along == "all" or X.ndim != 3:
        return arc(X[0], X[1], t, 1.0)
    if along == "columns":
        return nuslerp(X.transpose(0, 2, 1), w, "rows").T
    return np.stack([arc(a, b, t, 1.0) for a, b in zip(X[0], X[1], strict=True)])


def multislerp(X: Array, w: Array) -> Array:
    """The direction of the mean direction, at the mean length."""
    share = w / w.sum()
    lengths = [np.linalg.norm(x) for x in X]
    mean = sum(
        (s * x / n for s, x, n in zip(share, X, lengths, strict=True) if n), np.zeros_like(X[0])
    )
    size = np.linalg.norm(mean)
    return (share @ lengths) * mean / size if size else np.zeros_like(X[0])


def karcher(X: Array, w: Array) -> Array:
    """Log and exp maps on the vectors themselves, until nothing moves."""
    share = w / w.sum()
    lengths = np.array([np.linalg.norm(x) for x in X])
    if not lengths.any():
        return np.zeros_like(X[0])
    units = [x / n for x, n in zip(X, lengths, strict=True) if n]
    alpha = share[lengths > 0] / share[lengths > 0].sum()
    point = sum(a * u for a, u in zip(alpha, units, strict=True))
    point = point / np.linalg.norm(point)
    for _ in range(500):
        step = np.zeros_like(point)
        for a, u in zip(alpha, units, strict=True):
            away = u - (u * point).sum() * point
            size = np.linalg.norm(away)
            if size > 1e-14:
                step += a * math.atan2(size, (u * point).sum()) * away / size
        size = np.linalg.norm(step)
        if size < 1e-13:
            break
        point = math.cos(size) * point + math.sin(size) * step / size
    return (share @ lengths) * point


def model_stock(X: Array, w: Array) -> Array:
    """The mean, as far as the mean cosine goes."""
    count, cosines = len(X), []
    for i in range(count):
        for j in range(i):
            size = np.linalg.norm(X[i]) * np.linalg.norm(X[j])
            cosines.append((X[i] * X[j]).sum() / size if size else 0.0)
    cosine = float(np.mean(cosines))
    return count * cosine / (1 + (count - 1) * cosine) * X.mean(0)


def sce(X: Array, w: Array, select_topk: float) -> Array:
    """Select, calculate, erase."""
    if select_topk < 1:
        spread = X.var(0).reshape(-1)
        stay = np.argsort(-spread, kind="stable")[: int(np.count_nonzero(spread) * select_topk)]
        mask = np.zeros(spread.size)
        mask[stay] = 1
        X = X * mask.reshape(X.shape[1:])
    energy = np.array([np.mean(x**2) for x in X])
    if not energy.sum():
        return np.zeros_like(X[0])
    return ties(X, energy / energy.sum(), "total", "weights")


def iso_c(X: Array, w: Array) -> Array:
    """The sum with a flat spectrum."""
    if X.ndim != 3:
        return weighted(X, w / w.sum())
    U, S, Vh = significant(weighted(X, w))
    return S.mean() * U @ Vh if len(S) else np.zeros_like(X[0])


def iso_cts(X: Array, w: Array, common_space_fraction: float) -> Array:
    """Common directions of the sum, then each task's own; one value for all."""
    if X.ndim != 3:
        return weighted(X, w / w.sum())
    X, count = X * w[:, None, None], len(X)
    U, S, Vh = significant(X.sum(0))
    if not len(S):
        return np.zeros_like(X[0])
    own = min(round((len(S) - int(len(S) * common_space_fraction)) / count), len(S) // count)
    common = len(S) - own * count
    left, right, values = [U[:, :common]], [Vh[:common].T], list(S[:common])
    for x in X:
        u, s, vh = significant(x - U[:, :common] @ U[:, :common].T @ x)
        left.append(u[:, :own])
        right.append(vh[:own].T)
        values += list(s[:own])
    return np.mean(values) * nearest(left) @ nearest(right).T


def tsv(X: Array, w: Array) -> Array:
    """The first triplets of each, decorrelated."""
    if X.ndim != 3:
        return weighted(X, w / w.sum())
    left, right, values = [], [], []
    for x in X * w[:, None, None]:
        u, s, vh = significant(x)
        keep = min(X.shape[1:]) // len(X)
        left.append(u[:, :keep])
        right.append(vh[:keep].T)
        values += list(s[:keep])
    return nearest(left) @ np.diag(values) @ nearest(right).T


def wudi(X: Array, w: Array) -> Array:
    """The minimum nearest to the sum, by least squares on the rows themselves."""
    if X.ndim != 3:
        return X.mean(0)
    some = [x for x in X if x.any()]
    if not some:
        return np.zeros_like(X[0])
    start = X.sum(0)
    rows = np.concatenate([x / np.linalg.norm(x) for x in some])
    target = np.concatenate([x @ (x / np.linalg.norm(x)).T for x in some], axis=1)
    step = np.linalg.lstsq(rows, (target - start @ rows.T).T, rcond=1e-7)[0].T
    return start + step


def fisher(X: Array, w: Array, minimum: float, statistics: Sequence[Array]) -> Array:
    """The mean by information."""
    sure = [v * np.maximum(F, minimum) for v, F in zip(w, statistics, strict=True)]
    return sum(s * x for s, x in zip(sure, X, strict=True)) / sum(sure)  # type: ignore[no-any-return]


def regmean(X: Array, w: Array, alpha: float, statistics: Sequence[Array]) -> Array:
    """Least squares, by the normal equations."""
    damped = [
        v * (alpha * G + (1 - alpha) * np.diag(np.diag(G)))
        for v, G in zip(w, statistics, strict=True)
    ]
    above = sum(x @ G for x, G in zip(X, damped, strict=True))
    return np.linalg.solve(sum(damped), above.T).T


def significant(matrix: Array) -> tuple[Array, Array, Array]:
    """The part of an SVD that is more than the rounding of float32."""
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    some = 1e-6 * max(S.max(initial=0), 1e-300) < S
    return U[:, some], S[some], Vh[some]


def nearest(parts: Sequence[Array]) -> Array:
    """The nearest orthonormal columns, ``X (XᵀX)^-½``; what coincides shares a direction."""
    X = np.concatenate(parts, axis=1)
    values, vectors = np.linalg.eigh(X.T @ X)
    roots = np.array([1 / math.sqrt(v) if v > 1e-6 else 0.0 for v in values])
    return X @ (vectors * roots) @ vectors.T


RULES: dict[str, Callable[..., Array]] = {
    "linear": weighted,
    "task_arithmetic": weighted,
    **{
        rule.__name__: rule
        for rule in (
            ties, magmax, slerp, nuslerp, multislerp, karcher, model_stock, sce, iso_c, iso_cts,
            tsv, wudi, fisher, regmean,
        )
    },
}  # fmt: skip
