"""LoRA, rsLoRA, DoRA and the bank: the laws of every kind, mixed batches, what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from cfm_train.bricks.lora import LoRA
from cfm_train.errors import UserError
from tests import brick_laws as laws
from tests.backbones import FAMILIES, answers, batch, randomise, tiny
from tests.lora_cases import VARIANTS, lora, maker, restored


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
class TestLaws:
    def test_starts_as_identity(self, family: str, variant: str) -> None:
        laws.starts_as_identity(maker(variant), family)

    def test_unplugs_exactly(self, family: str, variant: str) -> None:
        laws.unplugs_exactly(maker(variant), family)

    def test_rows_are_their_own(self, family: str, variant: str) -> None:
        laws.rows_are_their_own(maker(variant), family)

    def test_only_the_brick_learns(self, family: str, variant: str) -> None:
        laws.only_the_brick_learns(maker(variant), family)

    def test_round_trips(self, family: str, variant: str) -> None:
        laws.round_trips(maker(variant), family)

    def test_recomputes_the_same(self, family: str, variant: str) -> None:
        laws.recomputes_the_same(maker(variant), family)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generates_with_a_cache(family: str, variant: str) -> None:
    laws.generates_with_a_cache(maker(variant), family)


@pytest.mark.parametrize("rank", [3, 5, 7])
@pytest.mark.parametrize("rslora", [False, True])
def test_scales_survive_to_the_last_bit(rank: int, rslora: bool) -> None:
    """Alphas that no short decimal names, on whole modules and on slices."""
    for family, alpha in (("llama", math.pi), ("gpt2", 1 / 3), ("gpt2", 1e-12)):
        backbone = tiny(family)
        brick = lora(backbone, rank=rank, alpha=alpha, rslora=rslora)
        again = LoRA.restore(json.loads(json.dumps(brick.interface())), brick.files(), backbone)
        assert again.scales == brick.scales
        assert set(brick.scales.values()) == {alpha / (math.sqrt(rank) if rslora else rank)}


@pytest.mark.parametrize("family", FAMILIES)
def test_bank_equals_each_brick_alone(family: str) -> None:
    """Many bricks in one batch: any ranks, sites and variants; numbers and rows as weights."""
    backbone = tiny(family)
    inputs = batch(backbone, rows=4)
    bricks = [
        lora(backbone, rank=2),
        lora(backbone, rank=8, sites=["attn.q", "attn.k"], rslora=True),
        lora(backbone, rank=1, sites=["attn.v", "ffn.up"], layers=[0]),
        lora(backbone, rank=3, dora=True),
        lora(backbone, rank=3, bias="lora_bias"),
    ]
    for seed, brick in enumerate(bricks):
        randomise(brick.eval(), seed)
    alone = [laws.plugged(backbone, [brick], inputs) for brick in bricks]
    rows = torch.eye(4)
    weights = [*rows, torch.zeros(4)]
    mixed = laws.plugged(backbone, bricks, inputs, weights)
    for row in range(4):
        torch.testing.assert_close(mixed[row], alone[row][row], atol=1e-5, rtol=0)
    # A number for all rows, and the same number for every row, are the same thing.
    half = laws.plugged(backbone, bricks[:2], inputs, [0.5, None])
    same = laws.plugged(backbone, bricks[:2], inputs, [torch.full((4,), 0.5), torch.ones(4)])
    torch.testing.assert_close(half, same, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_the_bank_are_those_of_each_row_alone(family: str) -> None:
    """Rows that do not carry a brick leave its gradient as if they were not in the batch."""
    backbone = tiny(family)
    inputs = batch(backbone, rows=3)
    bricks = [lora(backbone, rank=2), lora(backbone, rank=5), lora(backbone, dora=True)]
    for seed, brick in enumerate(bricks):
        randomise(brick.train(), seed)
    with backbone.slots.plugged(bricks, list(torch.eye(3))):
        answers(backbone, inputs).square().mean(dim=(1, 2)).sum().backward()
    for row, brick in enumerate(bricks):
        together = [p.grad for p in brick.parameters()]
        brick.zero_grad()
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        with backbone.slots.plugged([brick]):
            answers(backbone, alone).square().mean().backward()
        for found, parameter in zip(together, brick.parameters(), strict=True):
            torch.testing.assert_close(found, parameter.grad, atol=1e-6, rtol=1e-4)


def test_token_weights_of_another_length_are_refused() -> None:
    """They would stretch one token over many unseen, when ``generate`` goes on token by token."""
    backbone = tiny("llama")
    brick = lora(backbone)
    with pytest.raises(UserError, match="weights for 4 tokens, but the batch has 1"):
        laws.plugged(backbone, [brick], batch(backbone, rows=2, length=1), [torch.ones(2, 4)])


def test_weights_scale_the_update_by_row_and_token() -> None:
    """The definition: y + w ⊙ s B A x at one site, in float64 by hand."""
    backbone = tiny("llama")
    inputs = batch(backbone, rows=3)
    bricks = [lora(backbone, rank=r, sites=["layer.1.ffn.down"]) for r in (2, 5)]
    for seed, brick in enumerate(bricks):
        randomise(brick.eval(), seed)
    generator = torch.Generator().manual_seed(3)
    weights = [
        torch.rand(inputs["input_ids"].shape, generator=generator),
        torch.tensor([0.5, 0, 2]),
    ]
    module = backbone.model.model.layers[1].mlp.down_proj
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    try:
        laws.plugged(backbone, bricks, inputs, weights)
    finally:
        handle.remove()
    x, y = seen[0]
    x = x.double()
    expected = x @ module.weight.double().T
    for brick, weight in zip(bricks, weights, strict=True):
        (A,), (B,) = brick.lora_A.values(), brick.lora_B.values()
        update = 7 / A.shape[0] * (x @ A.double().T @ B.double().T)
        expected = expected + update * weight.reshape(*weight.shape, *(1,) * (3 - weight.ndim))
    torch.testing.assert_close(y.double(), expected, atol=1e-6, rtol=0)


def _changed(files: dict[str, bytes], **keys: Any) -> dict[str, bytes]:
    config = json.loads(files["adapter_config.json"]) | keys
    return files | {"adapter_config.json": json.dumps(config).encode()}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "rewrites"),
        ({"bias": "all"}, "every bias"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_B.bias"),
        ({"r": 5}, "rank 5"),
        ({"rank_pattern": {"q_proj": 2}}, "rank 2"),
    ],
)
def test_what_is_not_computed_stops_the_load(keys: dict[str, Any], words: str) -> None:
    backbone = tiny("llama")
    files = lora(backbone).files()
    with pytest.raises(UserError, match=words):
        restored(_changed(files, **keys), backbone)


def test_tensors_that_do_not_fit_are_named() -> None:
    llama = tiny("llama")
    files = lora(llama).files()
    with pytest.raises(UserError, match="trained on another model"):
        restored(files, tiny("bert"))
    dora = lora(llama, dora=True).files()
    with pytest.raises(UserError, match="does not speak of"):
        restored(_changed(dora, use_dora=False), llama)
    narrow = lora(llama, sites=["attn.v"]).files()
    moved = narrow["adapter_model.safetensors"].replace(b"v_proj", b"q_proj")
    with pytest.raises(UserError, match="features"):
        restored(narrow | {"adapter_model.safetensors": moved}, llama)
    # As if PEFT had wrapped one stack of T5: paths that end like a module of either.
    files = lora(tiny("t5"), sites=["encoder.layer.0.attn.q"]).files()
    stem = "base_model.model."
    tensors = {
        name.replace(f"{stem}encoder.", stem): value
        for name, value in load(files["adapter_model.safetensors"]).items()
    }
    with pytest.raises(UserError, match=r"may be any of decoder.* encoder"):
        restored(files | {"adapter_model.safetensors": save(tensors)}, tiny("t5"))


def test_sites_that_set_a_row_twice_are_refused() -> None:
    backbone = tiny("gpt2")
    for changed in ({"dora": True}, {"bias": "lora_only"}):
        with pytest.raises(UserError, match="share output rows"):
            lora(backbone, sites=["attn.qkv", "attn.q"], **changed)
    with pytest.raises(UserError, match="lora_bias"):
        lora(backbone, dora=True, bias="lora_bias")
    laws.round_trips(lambda b: lora(b, sites=["attn.qkv", "attn.q"]), "gpt2")


def test_a_site_that_is_not_linear_is_refused() -> None:
    with pytest.raises(UserError, match=r"brick\.sites is empty"):
        lora(tiny("llama"), sites=[])
    with pytest.raises(UserError, match="not a linear layer"):
        lora(tiny("llama"), sites=["layer.0"])
