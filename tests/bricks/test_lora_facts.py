"""LoRA for facts: the laws, a plain loop over rows, and one fact for each row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import parameter_name
from cfm_train.bricks.lora import LoRA
from cfm_train.bricks.lora_facts import LoraFacts
from tests import brick_laws as laws
from tests.backbones import FAMILIES, answers, bare, batch, randomise, tiny
from tests.fact_cases import FACTS, solo

GIVEN = {"rank": 2, "alpha": 3.0, "sites": ["attn.v", "ffn.down"], "layers": None}


def lora_facts(backbone: Backbone, **changed: Any) -> LoraFacts:
    return LoraFacts(**GIVEN | changed).build(backbone)


@pytest.mark.parametrize("family", FAMILIES)
class TestLaws:
    def test_starts_as_identity(self, family: str) -> None:
        laws.starts_as_identity(lora_facts, family)

    def test_unplugs_exactly(self, family: str) -> None:
        laws.unplugs_exactly(lora_facts, family)

    def test_rows_are_their_own(self, family: str) -> None:
        laws.rows_are_their_own(lora_facts, family)

    def test_only_the_brick_learns(self, family: str) -> None:
        laws.only_the_brick_learns(lora_facts, family)

    def test_round_trips(self, family: str) -> None:
        laws.round_trips(lora_facts, family)

    def test_recomputes_the_same(self, family: str) -> None:
        if family != "t5":  # its layers are checkpointed in a way of their own
            laws.recomputes_the_same(lora_facts, family)


def test_a_new_brick_of_facts_changes_nothing_and_its_facts_start_alike() -> None:
    backbone = tiny("llama")
    inputs = batch(backbone, rows=4)
    torch.manual_seed(0)
    brick = LoraFacts(**GIVEN).for_facts(FACTS).build(backbone)
    torch.manual_seed(0)
    alone = LoraFacts(**GIVEN).for_facts(FACTS[1:2]).build(backbone)
    for name, value in alone.named_parameters():
        assert torch.equal(brick.get_parameter(name)[1:2], value)
    brick.fire(torch.tensor([0, 1, -1, 2]))
    assert torch.equal(laws.plugged(backbone, [brick], inputs), bare(backbone, inputs))


def test_a_plain_loop_over_rows() -> None:
    """``y + (alpha / r) B_i A_i x`` in float64 row by row, beside transformers' own module."""
    backbone = tiny("llama")
    inputs = batch(backbone, rows=4)
    brick = LoraFacts(**GIVEN | {"sites": ["ffn.down"], "layers": [1]}).for_facts(FACTS)
    brick.build(backbone)
    randomise(brick, scale=0.3)
    chosen = [2, -1, 0, 1]
    brick.fire(torch.tensor(chosen))
    seen: dict[str, Tensor] = {}
    module = backbone.model.model.layers[1].mlp
    hook = module.down_proj.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    end = module.register_forward_hook(lambda _, args, out: seen.update(y=out))
    with torch.no_grad():
        answers(backbone, inputs)
        x, expected = seen["x"].double(), seen["y"].double().clone()
        before = expected.clone()
        with backbone.slots.plugged([brick]):
            answers(backbone, inputs)
    hook.remove()
    end.remove()
    key = parameter_name(brick.site_names[0])
    for row, fact in enumerate(chosen):
        if fact >= 0:
            A, B = brick.lora_A[key][fact].double(), brick.lora_B[key][fact].double()
            expected[row] += 3.0 / 2 * (x[row] @ A.T) @ B.T
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(seen["y"].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_fact_for_each_row(family: str) -> None:
    """Also against LoRA itself with the matrices of a fact, on all rows."""
    backbone = tiny(family)
    inputs = batch(backbone, rows=4)
    brick = LoraFacts(**GIVEN).for_facts(FACTS).build(backbone)
    randomise(brick, scale=0.3)
    solo(brick, backbone, inputs)
    lora = LoRA(**GIVEN, dropout=0.0, rslora=False, dora=False, bias="none").build(backbone).eval()
    with torch.no_grad():
        for name, value in lora.named_parameters():
            value.copy_(brick.get_parameter(name)[2])
    expected = laws.plugged(backbone, [lora], inputs)
    brick.fire(torch.tensor([2, 2, 2, 2]))
    torch.testing.assert_close(laws.plugged(backbone, [brick], inputs), expected, atol=1e-5, rtol=0)
    brick.fire(torch.tensor([-1, -1, -1, -1]))
    assert torch.equal(laws.plugged(backbone, [brick], inputs), bare(backbone, inputs))


def test_without_a_gate_all_facts_act() -> None:
    backbone = tiny("llama")
    inputs = batch(backbone)
    brick = LoraFacts(**GIVEN).for_facts(FACTS).build(backbone)
    randomise(brick, scale=0.3)
    wide = GIVEN | {"rank": 2 * len(FACTS), "alpha": 3.0 * len(FACTS)}
    lora = LoRA(**wide, dropout=0.0, rslora=False, dora=False, bias="none").build(backbone).eval()
    with torch.no_grad():
        for name, value in lora.named_parameters():
            own = brick.get_parameter(name)
            flat = own.flatten(0, 1) if "lora_A" in name else torch.cat(list(own), dim=1)
            value.copy_(flat)
    torch.testing.assert_close(
        laws.plugged(backbone, [brick], inputs),
        laws.plugged(backbone, [lora], inputs),
        atol=1e-5,
        rtol=0,
    )
