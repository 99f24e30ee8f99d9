"""IA3: the laws of every kind, and PEFT as the oracle in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.ia3 import IA3, scale
from cfm_train.errors import UserError
from tests import brick_laws as laws
from tests.backbones import FAMILIES, FUSED, answers, bare, batch, tiny
from tests.peft_peers import files_of, in_peft, trained_by_peft, values


def ia3(backbone: Backbone, **changed: Any) -> IA3:
    """A new brick as ``conf/brick/ia3.yaml`` has it, unless told otherwise."""
    return IA3(**{"sites": ["k", "v"], "inputs": ["ffn.down"], "layers": None} | changed).build(
        backbone
    )


@pytest.mark.parametrize("family", FAMILIES)
class TestLaws:
    def test_starts_as_identity(self, family: str) -> None:
        laws.starts_as_identity(ia3, family)

    def test_unplugs_exactly(self, family: str) -> None:
        laws.unplugs_exactly(ia3, family)

    def test_rows_are_their_own(self, family: str) -> None:
        laws.rows_are_their_own(ia3, family)

    def test_only_the_brick_learns(self, family: str) -> None:
        laws.only_the_brick_learns(ia3, family)

    def test_round_trips(self, family: str) -> None:
        laws.round_trips(ia3, family)
        laws.round_trips(lambda b: ia3(b, sites=["attn.o", "v"], inputs=[], layers=[-1]), family)

    def test_recomputes_the_same(self, family: str) -> None:
        laws.recomputes_the_same(ia3, family)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generates_with_a_cache(family: str) -> None:
    laws.generates_with_a_cache(ia3, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_peft_in_both_directions(family: str, tmp_path: Path) -> None:
    """PEFT's own choice of modules (on BERT also attention's output, on GPT-2 the fused c_attn)."""
    theirs = trained_by_peft(family, peft.IA3Config())
    backbone = tiny(family)
    inputs = batch(backbone)
    brick = IA3.restore({}, files_of(theirs, tmp_path / "theirs"), backbone)
    expected = values(theirs, inputs)
    assert (expected - bare(backbone, inputs)).abs().max() > 1e-2
    found = laws.plugged(backbone, [brick], inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert torch.equal(values(in_peft(brick, family, tmp_path / "ours"), inputs), expected)

    with backbone.slots.plugged([brick]):
        answers(backbone, inputs).square().mean().backward()
    answers(theirs, inputs).square().mean().backward()
    peers = dict(theirs.named_parameters())
    for name in brick.site_names:
        peer = peers[f"base_model.model.{brick.built_for[name].module}.ia3_l.default"]
        own = brick.factors[name.replace(".", "-")]
        torch.testing.assert_close(own.grad, peer.grad.flatten(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, *FUSED])
def test_made_here_runs_in_peft(family: str, tmp_path: Path) -> None:
    """On GPT-2 k and v are slices of c_attn: one vector for PEFT, with ones at q."""
    backbone = tiny(family)
    inputs = batch(backbone)
    brick = laws.random_brick(ia3, backbone)
    theirs = in_peft(brick, family, tmp_path / "ours")
    ours = laws.plugged(backbone, [brick], inputs)
    torch.testing.assert_close(values(theirs, inputs), ours, atol=1e-5, rtol=0)


def test_half_precision_rounds_the_output_and_not_the_factor() -> None:
    """Above 1 bfloat16 steps by 1/128: a factor of 1.003 would be 1, and a step of 0.003 lost."""
    y = torch.randn(8, 32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    factors = torch.full((64,), 1.003)
    assert (factors.bfloat16() == 1).all()
    step = scale(y, factors).float() - y.float()
    assert (step * y).sum() / y.float().square().sum() == pytest.approx(0.003, rel=0.2)
    torch.testing.assert_close(scale(y.float(), factors), y.float() * 1.003)


def test_what_does_not_fit_is_refused() -> None:
    llama, gpt2 = tiny("llama"), tiny("gpt2")
    with pytest.raises(UserError, match="overlap"):
        ia3(llama, sites=["ffn.down"])
    with pytest.raises(UserError, match="overlap"):
        ia3(gpt2, sites=["attn.qkv", "attn.q"])
    with pytest.raises(UserError, match=r"brick\.sites is empty"):
        ia3(gpt2, sites=[], inputs=[])
    with pytest.raises(UserError, match="shares its input"):
        ia3(gpt2, sites=[], inputs=["attn.q"])
    files = ia3(llama).files()
    with pytest.raises(UserError, match="trained on another model"):
        IA3.restore({}, files, tiny("bert"))
    config = json.loads(files["adapter_config.json"]) | {"new_feature": 3}
    with pytest.raises(UserError, match="new_feature"):
        IA3.restore({}, files | {"adapter_config.json": json.dumps(config).encode()}, llama)
