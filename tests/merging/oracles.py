"""Merges written out in NumPy, float64, whole matrices: an oracle for every combination.

    expected(rule, bricks, weights, backbone, mix, statistics)   site -> ΔW and bias of the merge

Nothing of `cfm_train.merging` is used but the numbers of a mix and the stream that a mask is drawn
from, so that random sparsifiers have the same mask. Rules and sparsifiers are one function each,
after their papers; spaces say what they are applied to, scopes how much of it at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick, parameter_name
from cfm_train.bricks.lora import LoRA
from cfm_train.merging.mix import Mix
from cfm_train.merging.sparsify.sparsifier import generator
from tests.merging.merges import updates as deltas_of

Array = np.ndarray
#: The statistics of a site, one matrix for each brick.
Statistics = Mapping[str, Sequence[Array]]
#: Name, site, updates ``[N, *shape]`` and weights ``[N]``.
Entry = tuple[str, str, Array, Array]


# ------------------------------------------------------------------------------------------ rules


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
#: Arguments of a rule that say how it is computed, not what.
_HOW = ("max_iter", "tolerance", "steps", "learning_rate")


# ------------------------------------------------------------------------------------ sparsifiers


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


# --------------------------------------------------------------------------------- one group


def combine(
    X: Array,
    w: Array,
    name: str,
    mix: Mix,
    sources: Sequence[str],
    statistics: Sequence[Array] | None,
    vector: bool = False,
) -> Array:
    """Sparsifier and rule on one tensor or group."""
    if mix.sparsifier.kind != "none":
        draws = np.zeros_like(X)
        if mix.sparsifier.random:
            for drawn, source in zip(draws, sources, strict=True):
                stream = generator(mix.seed, name, source)
                drawn[...] = torch.rand(X.shape[1:], generator=stream).double().numpy()
        X = SPARSE[mix.sparsifier.kind](X, draws, **vars(mix.sparsifier))
    if mix.rule.needs is not None and vector:
        return weighted(X, w / w.sum())
    given = {k: v for k, v in vars(mix.rule).items() if k not in (*_HOW, "promises", "multiplies")}
    more = {"statistics": statistics} if mix.rule.needs is not None else {}
    return RULES[mix.rule.kind](X, w, **given, **more)


# ----------------------------------------------------------------------------------------- spaces


def expected(
    bricks: Sequence[LoRA],
    weights: Sequence[float],
    backbone: Backbone,
    mix: Mix,
    statistics: Statistics | None = None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """What a merge of low-rank bricks is: ΔW ``[out, in]`` and bias ``[out]`` of every site.

    Args:
        bricks: the parents, LoRA without DoRA.
        weights: one number for each.
        backbone: theirs.
        mix: the merge; a space other than ``parameters`` and ``auto``.
        statistics: of every site, for rules that need them.
    """
    found = [{k: v.numpy() for k, v in deltas_of(brick).items()} for brick in bricks]
    sites = [name for name in backbone.sites if any(name in one for one in found)]
    w = np.array(weights, dtype=np.float64)
    entries: list[Entry] = []
    back: dict[str, Callable[[Array], Array]] = {}
    for site in sites:
        shape = next(one[site].shape for one in found if site in one)
        X = np.stack([one.get(site, np.zeros(shape)) for one in found])
        name, X, back[site] = taken_apart(mix.space, site, X, bricks)
        entries.append((name, site, X, w))
        if any(parameter_name(site) in brick.bias for brick in bricks):
            own = np.stack([added(brick, site, backbone) for brick in bricks])
            entries.append((f"{site}.bias", site, own, w))
    merged = merge_entries(entries, mix, statistics)
    matrices, biases = {}, {}
    for name, site, _, _ in entries:
        if name.endswith(".bias"):
            biases[site] = mix.scale * merged[name]
        else:
            matrices[site] = mix.scale * back[site](merged[name])
    return matrices, biases


def expected_parameters(
    bricks: Sequence[Brick], weights: Sequence[float], mix: Mix, neutral: float
) -> dict[str, Array]:
    """What a merge of parameters one by one is, for bricks of one kind, by parameter.

    Of LoRA bricks the scale is in the factors of the result, which is then scaled by one.
    """
    w = np.array(weights, dtype=np.float64)
    tables = [dict(brick.named_parameters()) for brick in bricks]
    entries: list[Entry] = []
    for name in tables[0]:
        X = np.stack([table[name].detach().double().numpy() - neutral for table in tables])
        site = next((s for s in bricks[0].site_names if parameter_name(s) in name.split(".")), name)
        given, part = w, name.split(".")[0]
        if isinstance(bricks[0], LoRA) and part in ("lora_A", "lora_B", "bias"):
            s = np.array([brick.scales[site] for brick in bricks])  # type: ignore[union-attr]
            if part == "bias" or (mix.fold == "b" and part == "lora_B"):
                X = X * s.reshape(-1, *[1] * (X.ndim - 1))
            elif mix.fold == "sqrt" and multiplies(mix):
                sign = np.sign(w) if part == "lora_A" else 1.0
                given = np.sqrt(np.abs(w) * s) * sign
            elif mix.fold == "sqrt":
                X = X * np.sqrt(s).reshape(-1, 1, 1)
        entries.append((name, site, X, given))
    merged = merge_entries(entries, mix, None)
    return {
        name: neutral + (1 if name.startswith("lora_A.") else mix.scale) * value
        for name, value in merged.items()
    }


def multiplies(mix: Mix) -> bool:
    """Whether a rule multiplies by its weights (and does not divide by them again)."""
    divides = vars(mix.rule).get("divisor") == "weights"
    sums = ("linear", "task_arithmetic", "ties", "iso_c", "iso_cts", "tsv")
    return mix.rule.kind in sums and not divides


def merge_entries(
    entries: Sequence[Entry], mix: Mix, statistics: Statistics | None
) -> dict[str, Array]:
    """Sparsifier and rule on each tensor, or on those of a layer or brick as one long vector."""
    sources = [str(number) for number in range(len(entries[0][2]))]
    merged: dict[str, Array] = {}
    for group in grouped([(name, site) for name, site, _, _ in entries], mix.scope):
        members = [entries[i] for i in group]
        if len(members) == 1:
            ((name, site, X, w),) = members
            facts = statistics[site] if statistics is not None else None
            merged[name] = combine(X, w, name, mix, sources, facts, X.ndim == 2)
            continue
        count = len(sources)
        flat = np.concatenate([X.reshape(count, -1) for _, _, X, _ in members], axis=1)
        shares = np.concatenate(
            [np.repeat(w[:, None], X[0].size, axis=1) for _, _, X, w in members], axis=1
        )
        if (shares == shares[:, :1]).all():
            shares = shares[:, 0]
        name = "\n".join(name for name, _, _, _ in members)
        whole = combine(flat, shares, name, mix, sources, None)
        for name, _, X, _ in members:
            merged[name], whole = whole[: X[0].size].reshape(X.shape[1:]), whole[X[0].size :]
    return merged


def added(brick: LoRA, site: str, backbone: Backbone) -> Array:
    """The bias that a brick adds at a site."""
    key = parameter_name(site)
    place = backbone.sites[site]
    if key not in brick.bias:
        return np.zeros(place.out_features)
    bias = brick.bias[key].detach().double().numpy()
    if brick.hyper["bias"] == "lora_bias":
        rank = brick.lora_A[key].shape[0]
        return brick.alphas[site] / (rank**0.5 if brick.hyper["rslora"] else rank) * bias  # type: ignore[no-any-return]
    assert place.rows is None
    own = backbone.model.get_submodule(place.module).bias
    return bias - own.detach().double().numpy()  # type: ignore[no-any-return]


def taken_apart(
    space: str, site: str, X: Array, bricks: Sequence[LoRA]
) -> tuple[str, Array, Callable[[Array], Array]]:
    """A site's updates as a space has them, their name, and the way back."""
    if space in ("delta", "cat"):
        if space == "delta":  # float32 is what rules are given; flat spectra blow its rounding up
            X = X.astype(np.float32).astype(np.float64)
        return f"{site}.weight", X, lambda merged: merged
    if space == "knots":
        U, S, _ = np.linalg.svd(np.concatenate(list(X), axis=1), full_matrices=False)
        some = 1e-9 * S[0] < S
        U, S = U[:, some], S[some]
        blocks = (U / S).T @ X  # the blocks of V, zero where a brick has nothing
        return f"{site}.aligned", blocks, lambda merged: (U * S) @ merged
    assert space == "core"
    key = parameter_name(site)
    own = [brick for brick in bricks if key in brick.lora_A]
    B = [b.scales[site] * b.lora_B[key].detach().double().numpy() for b in own]
    A = [b.lora_A[key].detach().double().numpy() for b in own]
    left, right = span(np.concatenate(B, axis=1)), span(np.concatenate(A).T)
    cores = np.stack([left.T @ x @ right for x in X])
    return f"{site}.core", cores, lambda merged: left @ merged @ right.T


def span(columns: Array) -> Array:
    """An orthonormal basis, largest direction first."""
    U, S, _ = np.linalg.svd(columns, full_matrices=False)
    return U[:, 1e-9 * S[0] < S]


def grouped(names: Sequence[tuple[str, str]], scope: str) -> list[list[int]]:
    """Which entries are taken at once."""
    if scope == "tensor":
        return [[i] for i in range(len(names))]
    groups: dict[str, list[int]] = {}
    for i, (_, site) in enumerate(names):
        numbers = [at for at, part in enumerate(site.split(".")) if part.isdigit()]
        layer = ".".join(site.split(".")[: numbers[0] + 1]) if numbers else site
        groups.setdefault(layer if scope == "layer" else "", []).append(i)
    return list(groups.values())
