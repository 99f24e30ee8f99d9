"""Every rule × sparsifier × space × scope, by value against the oracles."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch

from cfm_train.bricks.brick import parameter_name
from cfm_train.bricks.lora import LoRA
from cfm_train.config.merging import methods
from cfm_train.errors import UserError
from cfm_train.merging import engine
from cfm_train.merging.mix import Mix
from tests.backbones import tiny
from tests.merging import oracles
from tests.merging.merges import ONE, THREE, TWO, make, mix, relative, updates

SPARSIFIERS: dict[str, dict[str, float]] = {
    "none": {},
    "magnitude": {"density": 0.35},
    "dare": {"density": 0.6},
    "della": {"density": 0.6, "epsilon": 0.2},
    "breadcrumbs": {"density": 0.3, "gamma": 0.05},
    "tall": {"threshold": 0.5},
}
SCOPES = ("tensor", "layer", "brick")
SPACES = ("delta", "core", "knots", "cat")
WEIGHTS = [0.7, 0.4, 1.1]


HYPER = (
    {**ONE, "layers": [0]},
    {**TWO, "layers": [0]},
    {**THREE, "sites": ["attn.q", "attn.v"]},
)

option = functools.cache(mix)


def of(rule: str, sparsify: str, **given: object) -> Mix:
    """A rule's option with a sparsifier, λ and a seed."""
    sparsifier = option("linear", sparsify=sparsify, **SPARSIFIERS[sparsify]).sparsifier
    return dataclasses.replace(
        option(rule),
        sparsifier=sparsifier,
        scale=0.8,
        seed=3,
        **given,  # type: ignore[arg-type]
    )


@functools.cache
def parents(count: int) -> list[LoRA]:
    """Bricks that differ in ranks, alphas, scaling, sites and biases."""
    made = [make("bert", h, s) for s, h in enumerate(HYPER, start=1)]
    return made[-count:]  # type: ignore[return-value]


@functools.cache
def statistics(rule: str, site: str) -> list[np.ndarray]:
    """Made-up statistics of a site."""
    place = tiny("bert").sites[site]
    draw = np.random.default_rng(len(site))
    if rule == "fisher":
        return [draw.random((place.out_features, place.in_features)) for _ in range(3)]
    seen = [draw.normal(size=(200, place.in_features)) for _ in range(3)]
    return [x.T @ x for x in seen]


def refusal(rule: str, sparsify: str, space: str, scope: str) -> str | None:
    """What is said of a combination that is none."""
    chosen = option(rule).rule
    if space == "cat" and not (chosen.linear and sparsify == "none"):
        return "merge.space=cat adds updates up" if not chosen.needs else "merge.space=cat"
    if chosen.needs and space != "delta":
        return f"merge.space={space} has no weights"
    if space == "knots" and chosen.ranks:
        return "keeps the largest singular values"
    if space == "cat" or (chosen.linear and sparsify == "none" and space == "delta"):
        return None
    bound = chosen.matrices or chosen.needs or sparsify == "della"
    return "use merge.scope=tensor" if scope != "tensor" and bound else None


def check(rule: str, sparsify: str, space: str, scope: str) -> None:
    # As wide as the sites: nothing is cut.
    chosen = of(rule, sparsify, space=space, scope=scope, rank=None if space == "cat" else 64)
    bricks = parents(chosen.rule.most or 3)
    weights = WEIGHTS[: len(bricks)] if chosen.equal else None
    backbone = tiny("bert")
    kind = chosen.rule.needs

    def facts(site: str) -> list[torch.Tensor]:
        return [torch.from_numpy(one) for one in statistics(rule, site)]

    told = refusal(rule, sparsify, space, scope)
    if told is not None:
        with pytest.raises(UserError, match=told):
            engine.merge(bricks, weights, chosen, backbone, statistics=facts if kind else None)
        return
    merged = engine.merge(bricks, weights, chosen, backbone, statistics=facts if kind else None)
    brick = merged.brick
    assert isinstance(brick, LoRA)
    known = {s: statistics(rule, s) for s in brick.site_names} if kind else None
    matrices, biases = oracles.expected(
        bricks, weights or [1.0] * len(bricks), backbone, chosen, known
    )
    where = f"{rule} {sparsify} {space} {scope}"
    assert brick.site_names == tuple(matrices)
    for site, update in updates(brick).items():
        # Model Stock gives nothing where all is orthogonal; then the inputs are the measure.
        largest = max(float(updates(one)[site].norm()) for one in bricks if site in one.scales)
        size = max(float(np.linalg.norm(matrices[site])), 1e-3 * largest)
        off = np.linalg.norm(update.numpy() - matrices[site])
        assert off <= 1e-5 * size, f"{where} {site}: {off / size:.1e}"
        bias = brick.bias[parameter_name(site)].detach().double().numpy()
        assert brick.scales[site] == 1
        wanted = biases.get(site, np.zeros_like(bias))
        off = np.linalg.norm(bias - wanted)
        assert off <= max(1e-5 * np.linalg.norm(wanted), 1e-8), f"{where} {site}: bias {off:.1e}"


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("rule", methods("rule"))
def test_values(rule: str, space: str) -> None:
    for sparsify in SPARSIFIERS:
        for scope in SCOPES:
            check(rule, sparsify, space, scope)


@pytest.mark.parametrize("fold", ["sqrt", "b"])
@pytest.mark.parametrize("rule", [r for r in methods("rule") if r not in ("fisher", "regmean")])
def test_factors_one_by_one(rule: str, fold: str) -> None:
    """Ranks that differ by site, alphas and scalings by brick."""
    bricks = same_shapes()[: option(rule).rule.most or 3]
    for sparsify in SPARSIFIERS:
        for scope in SCOPES:
            chosen = of(rule, sparsify, space="parameters", scope=scope, fold=fold, rank=None)
            weights = [0.7, 0.4 if rule == "karcher" else -0.4, 1.1][: len(bricks)]
            given = weights if chosen.equal else None
            if scope != "tensor" and (chosen.rule.matrices or sparsify == "della"):
                with pytest.raises(UserError, match=r"use merge\.scope=tensor"):
                    engine.merge(bricks, given, chosen, tiny("bert"))
                continue
            found = engine.merge(bricks, given, chosen, tiny("bert")).brick
            assert isinstance(found, LoRA) and set(found.scales.values()) == {1.0}
            wanted = oracles.expected_parameters(bricks, given or [1.0] * 3, chosen, 0.0)
            table = dict(found.named_parameters())
            assert table.keys() == wanted.keys()
            for name, value in wanted.items():
                off = relative(table[name].detach(), torch.from_numpy(value))
                assert off < 1e-5, f"{rule} {sparsify} {scope} {fold} {name}: {off:.1e}"


@functools.cache
def same_shapes() -> list[LoRA]:
    """Bricks of equal shapes, with biases, whose scales differ."""
    made = []
    for seed, alpha in enumerate((4, 10, 3), start=1):
        scaled = {"alpha": alpha, "rslora": seed == 2, "bias": "lora_bias"}
        brick = make("bert", {"rank": 3, "sites": ["attn.q", "ffn.down"], **scaled}, seed)
        made.append(brick)
    return made  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["ia3", "pfeiffer", "bitfit", "prefix", "soft_prompt"])
@pytest.mark.parametrize("rule", ["linear", "ties/mergekit", "magmax", "multislerp", "sce", "tsv"])
def test_other_kinds_one_by_one(rule: str, kind: str) -> None:
    bricks = [make("bert", {}, seed, kind) for seed in (1, 2, 3)]
    for sparsify in ("none", "magnitude"):
        chosen = of(rule, sparsify, rank=None)
        weights = [0.5, 0.2, 0.6] if chosen.equal else None
        found = engine.merge(bricks, weights, chosen, tiny("bert")).brick
        wanted = oracles.expected_parameters(
            bricks, weights or [1.0] * 3, chosen, 1.0 if kind == "ia3" else 0.0
        )
        table = dict(found.named_parameters())
        for name, value in wanted.items():
            off = relative(table[name].detach(), torch.from_numpy(value))
            assert off < 1e-5, f"{rule} {sparsify} {kind} {name}: {off:.1e}"
