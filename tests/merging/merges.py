"""Merges as the tests write them: a rule's option, some parameters, the brick."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick, parameter_name
from cfm_train.bricks.lora import LoRA
from cfm_train.config.merging import complete
from cfm_train.merging import engine
from cfm_train.merging.mix import Mix, make_mix
from cfm_train.merging.spaces.space import Result
from tests.backbones import randomise, tiny
from tests.training.runs import new_brick

#: Ranks, scales and sites that differ from brick to brick.
ONE = {"rank": 2, "alpha": 8, "sites": ["attn.q", "attn.v"]}
TWO = {"rank": 5, "alpha": 3, "rslora": True, "sites": ["attn.v", "ffn.down"]}
THREE = {"rank": 3, "alpha": 6, "sites": ["attn.q"], "layers": [-1], "bias": "lora_bias"}


def make(family: str, hyper: dict[str, Any], seed: int, kind: str = "lora") -> Brick:
    """A brick with random parameters."""
    brick = new_brick(tiny(family), {}, kind, **hyper)
    randomise(brick, seed, 0.2)
    return brick.eval()


def mix(rule: str, **given: Any) -> Mix:
    """A rule's option with some parameters of its own."""
    return make_mix({**_defaults(rule, given.get("sparsify")), **given})


@functools.cache
def _defaults(rule: str, sparsify: str | None) -> dict[str, Any]:
    """All parameters of an option; composing them takes longer than a small merge."""
    return complete(rule, {} if sparsify is None else {"sparsify": sparsify})


def merged(
    rule: str, bricks: Sequence[Brick], weights: object, backbone: Backbone, **given: Any
) -> Result:
    """The merge of some bricks, and what a cut lost."""
    return engine.merge(bricks, weights, mix(rule, **given), backbone)


def updates(brick: Brick) -> dict[str, torch.Tensor]:
    """Site -> (alpha / r) B A in float64, by the papers' formulas."""
    assert isinstance(brick, LoRA)
    found = {}
    for site in brick.site_names:
        a, b = (
            side[parameter_name(site)].detach().double() for side in (brick.lora_A, brick.lora_B)
        )
        rank, alpha = a.shape[0], brick.alphas[site]
        found[site] = alpha / (rank**0.5 if brick.hyper["rslora"] else rank) * (b @ a)
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found - expected‖ / ‖expected‖."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def random_updates(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """``[count, *shape]`` float64, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    return drawn * torch.linspace(0.5, 2, count).view(-1, *[1] * len(shape))


def combined(
    rule: str,
    updates: torch.Tensor,
    weights: object = None,
    *,
    statistics: Sequence[torch.Tensor] = (),
    **given: Any,
) -> torch.Tensor:
    """One update ``[*shape]`` from several by a rule's option, λ applied."""
    chosen = mix(rule, **given)
    numbers = chosen.weights(weights, len(updates), {"": 1}).at("layer.0.attn.q")
    sources = [f"brick-{number}" for number in range(len(updates))]
    result = chosen.merge_updates(
        updates, torch.tensor(numbers, dtype=updates.dtype), "entry", sources, statistics
    )
    return result * chosen.scale


def mergekit(
    method: str, updates: torch.Tensor, weights: Sequence[float] | None = None, **parameters: Any
) -> torch.Tensor:
    """What mergekit makes of the same updates, on a base of zeros."""
    from mergekit.merge_methods.api import merge_tensors

    ids = ["base", *map(str, range(len(updates)))]
    if weights is not None:
        parameters["weight"] = dict(zip(ids[1:], weights, strict=True))
    base = torch.zeros_like(updates[0])
    return merge_tensors(
        [base, *(one.clone() for one in updates)],
        method,
        parameters=parameters,
        ids=ids,
        base_index=0,
    )


def low_rank_updates(count: int, rank: int, out: int, inn: int, seed: int = 0) -> torch.Tensor:
    """``[count, out, inn]`` float64 of a rank."""
    left, right = random_updates(count, out, rank, seed=seed), random_updates(count, rank, inn)
    return left @ right
