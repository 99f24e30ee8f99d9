"""Merges written out in NumPy, float64, whole matrices: an oracle for every combination.

    expected(rule, bricks, weights, backbone, mix, statistics)   site -> ΔW and bias of the merge

Nothing of `cfm_train.merging` is used but the numbers of a mix and the stream that a mask is drawn
from, so that random sparsifiers have the same mask. Rules (`oracle_rules`) and sparsifiers
(`oracle_sparsifiers`) are one function each, after their papers; spaces say here what they are
applied to, scopes how much of it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick, parameter_name
from cfm_train.bricks.lora import LoRA
from cfm_train.merging.mix import Mix
from cfm_train.merging.sparsify.sparsifier import generator
from tests.merging.merges import updates as deltas_of
from tests.merging.oracle_rules import RULES, weighted
from tests.merging.oracle_sparsifiers import SPARSE

Array = np.ndarray
#: The statistics of a site, one matrix for each brick.
Statistics = Mapping[str, Sequence[Array]]
#: Name, site, updates ``[N, *shape]`` and weights ``[N]``.
Entry = tuple[str, str, Array, Array]
#: Arguments of a rule that say how it is computed, not what.
_HOW = ("max_iter", "tolerance", "steps", "learning_rate")


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
