"""The modes by value: hand-written modules, PEFT, closed forms, and longer prompts as oracles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.bottleneck import Bottleneck
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.ia3 import IA3
from cfm_train.bricks.kinds import make_brick
from cfm_train.bricks.lora import LoRA
from cfm_train.bricks.prefix import Prefix
from cfm_train.bricks.soft_prompt import SoftPrompt
from cfm_train.config.compose import option
from cfm_train.stitching.fold import fold
from cfm_train.stitching.mode import modes
from cfm_train.stitching.promises import Null, order_effect, promises, random_probe
from cfm_train.stitching.stitch import Stitch, stitch_bricks
from tests import brick_laws as laws
from tests.backbones import FAMILIES, bare, batch, plain_model, randomise, tiny
from tests.brick_laws import plugged
from tests.lora_cases import lora
from tests.peft_peers import in_peft, values
from tests.stitching.naive import naive

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
#: Sites that are as wide as their input on every family.
SQUARE = ["attn.q", "attn.o"]
FOLDING = ("chain", "pipe", "sum")


def noisy(brick: Brick, seed: int, scale: float = 0.2) -> Any:
    randomise(brick, seed, scale)
    return brick.eval()


def loras(backbone: Backbone, sites: list[str] = SQUARE, **changed: Any) -> list[LoRA]:
    """Three bricks of different ranks and scales."""
    return [
        noisy(lora(backbone, sites=sites, rank=rank, alpha=alpha, **changed), seed)
        for seed, (rank, alpha) in enumerate([(4, 7), (2, 2), (3, 5)])
    ]


def adapters(backbone: Backbone, placement: str = "houlsby") -> list[Bottleneck]:
    return [
        noisy(Bottleneck(placement, width, "gelu", scale, None).build(backbone), seed)
        for seed, (width, scale) in enumerate([(6, 1.5), (4, 1.0)])
    ]


@pytest.mark.parametrize("mode", FOLDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_by_hand_and_folded(family: str, mode: str, tmp_path: Path) -> None:
    """Equal to the formula in wrapped modules, to one LoRA, and to PEFT with that LoRA."""
    backbone = tiny(family)
    inputs = batch(backbone)
    parts = loras(backbone)
    stitched = stitch_bricks(mode, parts, backbone)
    found = plugged(backbone, [stitched], inputs)
    torch.testing.assert_close(found, naive(family, backbone, mode, parts, inputs), **CLOSE)
    assert (found - bare(backbone, inputs)).abs().max() > 1e-2
    folded = fold(stitched, backbone)
    assert {a.shape[0] for a in folded.lora_A.values()} == {4 if mode == "pipe" else 9}
    again = LoRA.restore(folded.interface(), folded.body_files(), backbone).eval()
    torch.testing.assert_close(plugged(backbone, [again], inputs), found, **CLOSE)
    theirs = values(in_peft(folded, family, tmp_path / "adapter"), inputs)
    torch.testing.assert_close(theirs, found, **CLOSE)


@pytest.mark.parametrize("mode", FOLDING)
def test_biases_of_b_are_part_of_the_update(mode: str) -> None:
    backbone = tiny("bert")
    inputs = batch(backbone)
    parts = [
        noisy(lora(backbone, sites=SQUARE, bias=bias), seed)
        for seed, bias in enumerate(("lora_bias", "none", "lora_bias"))
    ]
    stitched = stitch_bricks(mode, parts, backbone)
    found = plugged(backbone, [stitched], inputs)
    torch.testing.assert_close(found, naive("bert", backbone, mode, parts, inputs), **CLOSE)
    folded = fold(stitched, backbone)
    torch.testing.assert_close(plugged(backbone, [folded], inputs), found, **CLOSE)


@pytest.mark.parametrize("mode", ["chain", "sum"])
@pytest.mark.parametrize("family", FAMILIES)
def test_absent_from_a_site_is_the_identity(family: str, mode: str) -> None:
    backbone = tiny(family)
    inputs = batch(backbone)
    one, _, _ = loras(backbone, ["attn.q", "ffn.down"])
    _, two, _ = loras(backbone, ["attn.q", "attn.v"], layers=[-1])
    found = plugged(backbone, [stitch_bricks(mode, [one, two], backbone)], inputs)
    torch.testing.assert_close(found, naive(family, backbone, mode, [one, two], inputs), **CLOSE)


@pytest.mark.parametrize("mode", FOLDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_by_hand(family: str, mode: str) -> None:
    backbone = tiny(family)
    inputs = batch(backbone)
    parts = adapters(backbone)
    found = plugged(backbone, [stitch_bricks(mode, parts, backbone)], inputs)
    torch.testing.assert_close(found, naive(family, backbone, mode, parts, inputs), **CLOSE)
    assert (found - bare(backbone, inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("mode", FOLDING)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_ia3_by_its_closed_form(family: str, mode: str) -> None:
    """Factors multiply in a chain; 1 + Σ (l − 1) side by side, 1 + Π (l − 1) in a pipe."""
    backbone = tiny(family)
    inputs = batch(backbone)
    one, two, single = (
        noisy(IA3(["k", "v"], ["ffn.down"], None).build(backbone), seed, 0.3) for seed in range(3)
    )
    for name, factors in single.factors.items():
        a, b = one.factors[name].detach(), two.factors[name].detach()
        combined = {"chain": a * b, "sum": a + b - 1, "pipe": 1 + (a - 1) * (b - 1)}[mode]
        factors.data.copy_(combined)
    found = plugged(backbone, [stitch_bricks(mode, [one, two], backbone)], inputs)
    torch.testing.assert_close(found, plugged(backbone, [single], inputs), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_sum_is_what_peft_does_with_two_adapters(family: str, tmp_path: Path) -> None:
    """``set_adapter([a, b])``, for bricks of different ranks and sites."""
    backbone = tiny(family)
    inputs = batch(backbone)
    parts = [loras(backbone, ["attn.q", "ffn.down"])[0], loras(backbone)[1]]
    for number, part in enumerate(parts):
        (tmp_path / str(number)).mkdir()
        for name, content in part.body_files().items():
            (tmp_path / str(number) / name).write_bytes(content)
    model = peft.PeftModel.from_pretrained(plain_model(family), tmp_path / "0", "a")
    model.load_adapter(tmp_path / "1", "b")
    model.base_model.set_adapter(["a", "b"])
    found = plugged(backbone, [stitch_bricks("sum", parts, backbone)], inputs)
    torch.testing.assert_close(found, values(model.eval(), inputs), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_one_longer_prompt(family: str) -> None:
    """In order: the first brick's tokens, then the second's, then the text."""
    backbone = tiny(family)
    inputs = batch(backbone)
    parts = [noisy(SoftPrompt(n, "vocabulary", None).build(backbone), n) for n in (3, 2)]
    longer = SoftPrompt(5, "vocabulary", None).build(backbone).eval()
    longer.embeddings.data.copy_(torch.cat([part.embeddings for part in parts]))
    stitched = stitch_bricks("prompt", parts, backbone)
    assert stitched.virtual_tokens() == 5
    found = plugged(backbone, [stitched], inputs)
    torch.testing.assert_close(found, plugged(backbone, [longer], inputs), **CLOSE)
    if family != "t5":  # whose encoder knows positions by distance alone, and no causal mask
        other = plugged(backbone, [stitch_bricks("prompt", parts[::-1], backbone)], inputs)
        assert (other - found).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_prefixes_are_one_longer_prefix(family: str) -> None:
    backbone = tiny(family)
    inputs = batch(backbone)
    parts = [
        noisy(Prefix(n, "vocabulary", None, ["attn"], None, None, "behind").build(backbone), n)
        for n in (3, 2)
    ]
    longer = Prefix(5, "vocabulary", None, ["attn"], None, None, "behind").build(backbone).eval()
    for name in longer.keys:
        longer.keys[name].data.copy_(torch.cat([part.keys[name] for part in parts]))
        longer.values[name].data.copy_(torch.cat([part.values[name] for part in parts]))
    stitched = stitch_bricks("prompt", parts, backbone)
    assert stitched.virtual_tokens() == 5
    found = plugged(backbone, [stitched], inputs)
    torch.testing.assert_close(found, plugged(backbone, [longer], inputs), **CLOSE)


def made(mode: str, backbone: Backbone) -> Stitch:
    """A stitch of each mode, of another kind of bricks."""
    if mode == "prompt":
        parts: list[Any] = [SoftPrompt(2, "vocabulary", None).build(backbone) for _ in range(2)]
        return stitch_bricks(mode, [noisy(p, s) for s, p in enumerate(parts)], backbone)
    bricks = adapters(backbone) if mode == "pipe" else loras(backbone)
    return stitch_bricks(mode, bricks, backbone)


@pytest.mark.parametrize("mode", modes())
@pytest.mark.parametrize("family", FAMILIES)
def test_unplugs_exactly(family: str, mode: str) -> None:
    laws.unplugs_exactly(lambda backbone: made(mode, backbone), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_mixed_batch(family: str) -> None:
    """Another stitch for every row, and a plain brick: each as in its solo run."""
    backbone = tiny(family)
    inputs = batch(backbone, rows=5)
    bricks: list[Brick] = [made(m, backbone) for m in ("chain", "pipe", "sum")]
    bricks.append(loras(backbone)[2])
    weights = [torch.eye(5)[row] for row in range(4)]
    mixed = plugged(backbone, bricks, inputs, weights)
    for row, brick in enumerate(bricks):
        alone = plugged(backbone, [brick], inputs)
        torch.testing.assert_close(mixed[row], alone[row], atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed[4], bare(backbone, inputs)[4], atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", FOLDING)
@pytest.mark.parametrize("weight", [0.3, -1.5, torch.tensor([0.0, 1.0, 0.5, 2.0])])
def test_a_weight_scales_the_whole_stitch(mode: str, weight: float | Tensor) -> None:
    backbone = tiny("llama")
    inputs = batch(backbone)
    stitched = stitch_bricks(mode, loras(backbone), backbone)
    found = plugged(backbone, [stitched], inputs, [weight])
    expected = plugged(backbone, [fold(stitched, backbone)], inputs, [weight])
    torch.testing.assert_close(found, expected, **CLOSE)
    # One adapter place, so that the weight's meaning there can be written down.
    backbone = tiny("bert")
    inputs = batch(backbone)
    one = [noisy(Bottleneck("pfeiffer", 4, "gelu", 1.0, [-1]).build(backbone), s) for s in (1, 2)]
    stitched = stitch_bricks(mode, one, backbone)
    site = backbone.sites[one[0].site_names[0]]
    seen: list[Tensor] = []
    hook = backbone.model.get_submodule(site.module).register_forward_hook(
        lambda module, args, output: seen.append(output.detach().clone())
    )
    try:
        for plan in ([], [stitched]):
            plugged(backbone, plan, inputs)
        plugged(backbone, [stitched], inputs, [weight])
    finally:
        hook.remove()
    h, full, weighed = seen
    w = weight.reshape(-1, 1, 1) if isinstance(weight, Tensor) else weight
    torch.testing.assert_close(weighed, h + w * (full - h), **CLOSE)


def test_differences_are_not_rounded_away_in_half_precision() -> None:
    """A tiny contribution survives: the sum of two is as near to float32 as one of them alone."""
    wide, half = tiny("bert"), tiny("bert", "bfloat16")
    inputs = batch(wide)
    parts = adapters(wide)
    exact = plugged(wide, [stitch_bricks("sum", parts, wide)], inputs)
    rounded = plugged(half, [stitch_bricks("sum", parts, half)], inputs).float()
    error = (rounded - exact).abs().max()
    single = plugged(half, parts[:1], inputs).float() - plugged(wide, parts[:1], inputs)
    assert error <= 2 * single.abs().max()


@pytest.mark.parametrize("mode", ["chain", "pipe", "sum"])
def test_stitches_nest(mode: str) -> None:
    """Chains, pipes and sums are associative, for LoRA and for adapters."""
    backbone = tiny("llama")
    inputs = batch(backbone)
    for one, two, three in (loras(backbone), [*adapters(backbone), adapters(backbone)[0]]):
        flat = stitch_bricks(mode, [one, two, three], backbone)
        left = stitch_bricks(mode, [stitch_bricks(mode, [one, two], backbone), three], backbone)
        right = stitch_bricks(mode, [one, stitch_bricks(mode, [two, three], backbone)], backbone)
        expected = plugged(backbone, [flat], inputs)
        for nested in (left, right):
            torch.testing.assert_close(plugged(backbone, [nested], inputs), expected, **CLOSE)


def test_a_sum_inside_a_chain() -> None:
    backbone = tiny("bert")
    inputs = batch(backbone)
    one, two, three = loras(backbone)
    inner = stitch_bricks("sum", [one, two], backbone)
    found = plugged(backbone, [stitch_bricks("chain", [inner, three], backbone)], inputs)
    both = fold(inner, backbone)
    expected = naive("bert", backbone, "chain", [both, three], inputs)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_kinds_side_by_side_each_right_by_value() -> None:
    """A soft prompt, a LoRA and an adapter on different ports: as if plugged one beside the other;
    DoRA, a bias delta and LoRA at one site: their updates added, each as it would be alone."""
    backbone = tiny("bert")
    inputs = batch(backbone)
    prompt = noisy(SoftPrompt(3, "vocabulary", None).build(backbone), 1)
    mixed = [prompt, loras(backbone)[0], adapters(backbone, "pfeiffer")[1]]
    for mode in ("sum", "chain"):
        found = plugged(backbone, [stitch_bricks(mode, mixed, backbone)], inputs)
        torch.testing.assert_close(found, plugged(backbone, mixed, inputs), **CLOSE)
    site = {"sites": ["layer.1.ffn.down"]}
    one = noisy(lora(backbone, **site), 1)
    two = noisy(lora(backbone, **site, dora=True), 2)
    three = make_brick({**option("brick", "bitfit"), "parameters": ["layer.1.ffn.down.bias"]})
    three = noisy(three.build(backbone), 3)
    name = one.site_names[0]
    seen: list[Tensor] = []
    hook = backbone.model.get_submodule(backbone.sites[name].module).register_forward_hook(
        lambda module, args, output: seen.append(output.detach().clone())
    )
    try:
        for plan in (
            [],
            [one],
            [two],
            [three],
            [stitch_bricks("sum", [one, two, three], backbone)],
        ):
            plugged(backbone, plan, inputs)
    finally:
        hook.remove()
    h, *alone, together = seen
    torch.testing.assert_close(together, h + sum(y - h for y in alone), **CLOSE)


@pytest.mark.parametrize("mode", modes())
def test_promises_hold(mode: str) -> None:
    backbone = tiny("gpt2")
    stitched = made(mode, backbone)
    probe = random_probe(backbone)
    checks = promises(stitched, probe)
    assert len(checks) >= 2 and all(check["passed"] for check in checks.values()), checks
    effect = order_effect(stitched, probe)
    assert effect["n"] == probe.tokens == 24
    assert effect["value"] < 1e-5 if mode == "sum" else effect["value"] > 1e-3
    forth = probe.ask(stitched)
    back = probe.ask(stitch_bricks(mode, list(stitched.parts)[::-1], backbone))  # type: ignore[arg-type]
    worst = (forth - back).abs().max() / (forth - probe.ask()).abs().max()
    assert effect["value"] == pytest.approx(worst.item())


def test_a_broken_promise_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny("bert")
    stitched = stitch_bricks("chain", adapters(backbone), backbone)
    monkeypatch.setattr(Null, "plugs", lambda self: self.like[0].plugs())
    checks = promises(stitched, random_probe(backbone))
    assert not checks["a brick that does nothing leaves the other as it is"]["passed"]
