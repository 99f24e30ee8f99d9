"""Neurons beside the feed-forward: the laws, a plain loop, and one fact for each row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import parameter_name
from cfm_train.bricks.neurons import Neurons
from tests import brick_laws as laws
from tests.backbones import FAMILIES, answers, bare, batch, randomise, tiny
from tests.fact_cases import FACTS, solo


def neurons(backbone: Backbone, **changed: Any) -> Neurons:
    return Neurons(**{"neurons": 3, "activation": "gelu", "layers": None} | changed).build(backbone)


@pytest.mark.parametrize("family", FAMILIES)
class TestLaws:
    def test_starts_as_identity(self, family: str) -> None:
        laws.starts_as_identity(neurons, family)

    def test_unplugs_exactly(self, family: str) -> None:
        laws.unplugs_exactly(neurons, family)

    def test_rows_are_their_own(self, family: str) -> None:
        laws.rows_are_their_own(neurons, family)

    def test_only_the_brick_learns(self, family: str) -> None:
        laws.only_the_brick_learns(neurons, family)

    def test_round_trips(self, family: str) -> None:
        laws.round_trips(neurons, family)

    def test_recomputes_the_same(self, family: str) -> None:
        if family != "t5":  # its layers are checkpointed in a way of their own
            laws.recomputes_the_same(neurons, family)


def test_a_plain_loop_over_neurons() -> None:
    """``y + Σ_j f(k_j · x + b_j) v_j`` in float64, beside transformers' own feed-forward."""
    backbone = tiny("llama")
    brick = neurons(backbone, layers=[1])
    randomise(brick, scale=0.3)
    inputs = batch(backbone)
    seen: dict[str, Tensor] = {}
    module = backbone.model.model.layers[1].mlp
    hook = module.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    with torch.no_grad():
        answers(backbone, inputs)
        before = {name: value.double() for name, value in seen.items()}
        with backbone.slots.plugged([brick]):
            answers(backbone, inputs)
    hook.remove()
    key = parameter_name(brick.site_names[0])
    expected = before["y"].clone()
    for k, b, v in zip(brick.keys[key][0], brick.biases[key][0], brick.values[key][0], strict=True):
        fired = nn.functional.gelu((before["x"] * k.double()).sum(-1) + b.double())
        expected = expected + fired[..., None] * v.double()
    assert (expected - before["y"]).abs().max() > 1e-2
    torch.testing.assert_close(seen["y"].double(), expected, atol=1e-5, rtol=0)


def test_one_fact_for_each_row() -> None:
    """A row equals the same row through a brick of its fact alone; no fact, nothing done."""
    backbone = tiny("llama")
    inputs = batch(backbone, rows=4)
    torch.manual_seed(0)
    brick = Neurons(neurons=2, activation="silu", layers=None).for_facts(FACTS).build(backbone)
    randomise(brick, scale=0.3)
    solo(brick, backbone, inputs)
    brick.fire(torch.tensor([-1, -1, -1, -1]))
    assert torch.equal(laws.plugged(backbone, [brick], inputs), bare(backbone, inputs))


def test_without_a_gate_all_facts_act() -> None:
    backbone = tiny("llama")
    inputs = batch(backbone)
    many = Neurons(neurons=2, activation="gelu", layers=None).for_facts(FACTS).build(backbone)
    randomise(many, scale=0.3)
    one = neurons(backbone, neurons=2 * len(FACTS))
    with torch.no_grad():
        for name, value in one.named_parameters():
            value.copy_(many.get_parameter(name).reshape(value.shape))
    torch.testing.assert_close(
        laws.plugged(backbone, [many], inputs), laws.plugged(backbone, [one], inputs)
    )
