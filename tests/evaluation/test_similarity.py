"""Cosines and sign conflicts against dense NumPy, entry by entry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cfm_train.bricks.brick import Brick, parameter_name
from cfm_train.bricks.lora import LoRA
from cfm_train.evaluation import similarity as module
from cfm_train.evaluation.similarity import layer_of, similarity
from tests.backbones import tiny
from tests.training.runs import new_brick


def filled(seed: int, kind: str = "lora", **options: Any) -> Brick:
    """A brick with random parameters, a third of them 0."""
    brick = new_brick(tiny("bert"), {}, kind, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in brick.parameters():
            value = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(value * (torch.rand(parameter.shape, generator=generator) > 1 / 3))
    return brick


def dense(brick: Brick) -> dict[str, np.ndarray]:
    """The updates by site, or the parameters by name, in float64."""
    if not isinstance(brick, LoRA):
        neutral = getattr(brick, "neutral", 0.0)
        return {n: t.double().numpy() - neutral for n, t in brick.tensors().items()}
    found = {}
    for site in brick.site_names:
        key = parameter_name(site)
        A, B = (f[key].detach().double().numpy() for f in (brick.lora_A, brick.lora_B))
        found[site] = brick.scales[site] * (B @ A)
    return found


def expected(one: dict[str, np.ndarray], other: dict[str, np.ndarray], names: Any) -> list[float]:
    """Cosine, sign conflict and weighted conflict of two flat vectors."""
    shapes = {**{n: v.shape for n, v in one.items()}, **{n: v.shape for n, v in other.items()}}
    a, b = (
        np.concatenate([side.get(n, np.zeros(shapes[n])).ravel() for n in names])
        for side in (one, other)
    )
    both = (a != 0) & (b != 0)
    opposite = both & (np.sign(a) != np.sign(b))
    sizes = np.abs(a * b)
    return [
        a @ b / np.sqrt((a @ a) * (b @ b)),
        opposite.sum() / both.sum(),
        sizes[opposite].sum() / sizes.sum(),
    ]


FIGURES = ("cosine", "sign_conflict", "weighted_conflict")


@pytest.mark.parametrize("chunk", [7, 2**20])
def test_low_rank_updates_equal_the_dense_formula(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks, scales and sites differ; chunks of one row and of everything count alike."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    bricks = {
        "a": filled(1, rank=3, alpha=5, sites=["attn.q", "attn.v"]),
        "b": filled(2, rank=5, alpha=1, sites=["attn.q", "ffn.up"], rslora=True),
        "c": filled(3, rank=2, sites=["attn.q", "attn.v"]),
    }
    found = similarity(bricks)
    assert found["labels"] == ["a", "b", "c"] and len(found["pairs"]) == 3
    for pair in found["pairs"]:
        one, other = dense(bricks[pair["a"]]), dense(bricks[pair["b"]])
        names = list({**one, **other})
        assert pair["of"] == "updates" and pair["reason"] is None
        assert [pair[f] for f in FIGURES] == pytest.approx(expected(one, other, names), rel=1e-9)
        layers = {layer["layer"]: layer for layer in pair["layers"]}
        assert set(layers) == {layer_of(name) for name in names}
        for layer, figures in layers.items():
            inside = [name for name in names if layer_of(name) == layer]
            right = expected(one, other, inside)
            assert [figures[f] for f in FIGURES] == pytest.approx(right, rel=1e-9)


@pytest.mark.parametrize("kind", ["ia3", "bitfit", "pfeiffer"])
def test_other_kinds_are_compared_by_their_parameters(kind: str) -> None:
    bricks = {"a": filled(1, kind), "b": filled(2, kind)}
    (pair,) = similarity(bricks)["pairs"]
    one, other = dense(bricks["a"]), dense(bricks["b"])
    assert pair["of"] == "parameters"
    assert [pair[f] for f in FIGURES] == pytest.approx(expected(one, other, list(one)), rel=1e-9)


def test_what_cannot_be_compared_says_so() -> None:
    """Other kinds, other shapes, DoRA; disjoint sites have cosine 0 and no shared entry."""
    bricks = {
        "lora": filled(1, sites=["attn.q"]),
        "elsewhere": filled(2, sites=["attn.v"]),
        "dora": filled(3, "dora", sites=["attn.q"]),
        "ia3": filled(4, "ia3"),
        "ia3 of another size": filled(5, "ia3", layers=[0]),
        "new": new_brick(tiny("bert"), {}, "lora", sites=["attn.q"]),
    }
    found = {(p["a"], p["b"]): p for p in similarity(bricks)["pairs"]}
    assert found["lora", "elsewhere"]["cosine"] == 0.0
    assert found["lora", "elsewhere"]["sign_conflict"] is None
    assert found["lora", "dora"]["reason"] == "DoRA's update is no low-rank sum"
    assert found["lora", "ia3"]["reason"] == "they are of the kinds lora and ia3"
    assert "sites or shapes" in found["ia3", "ia3 of another size"]["reason"]
    assert all(p["cosine"] is None for p in found.values() if p["reason"])
    assert found["lora", "new"]["cosine"] is None  # nothing has been learnt yet
    assert found["lora", "new"]["reason"] is None


def test_layers_are_read_from_sites_and_parameters() -> None:
    assert layer_of("layer.3.attn.q") == "layer.3"
    assert layer_of("delta.decoder-layer-12-attn-q-bias") == "decoder.layer.12"
    assert layer_of("layer.3+1.ffn.up") == "layer.3+1"
    assert layer_of("embed.norm") == ""
