"""Deltas: the laws of every kind, and a model whose parameters are really changed as the oracle."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.delta import Delta
from cfm_train.errors import UserError
from tests import brick_laws as laws
from tests.backbones import FAMILIES, plain_model, tiny

#: What is chosen -> what transformers calls these parameters, written down by hand.
CHOICES: dict[tuple[str, ...], dict[str, str]] = {
    ("bias",): {"bert": r".*\.bias", "gpt2": r".*\.bias"},
    ("*norm",): {
        "bert": r".*LayerNorm\.(weight|bias)",
        "llama": r".*norm\.weight",
        "gpt2": r".*ln_\w\.(weight|bias)",
        "t5": r".*layer_norm\.weight",
        "modernbert": r".*norm\.weight",
    },
    ("norm.weight", "attn.o.bias"): {
        "bert": r"encoder\..*LayerNorm\.weight|.*attention\.output\.dense\.bias",
        "gpt2": r".*ln_\w\.weight|.*attn\.c_proj\.bias",
    },
    ("attn.q.weight", "ffn.down"): {
        "bert": r".*query\.weight|.*[0-9]\.output\.dense\.(weight|bias)",
        "llama": r".*q_proj\.weight|.*down_proj\.weight",
        "gpt2": r".*c_attn\.weight|.*mlp\.c_proj\.(weight|bias)",
        "t5": r".*SelfAttention\.q\.weight|.*wo\.weight",
    },
}
CASES = [(family, list(patterns)) for patterns in CHOICES for family in CHOICES[patterns]]


def delta(backbone: Backbone, parameters: list[str], **changed: Any) -> Delta:
    return Delta(**{"parameters": parameters, "layers": None} | changed).build(backbone)


def maker(parameters: list[str], **changed: Any) -> laws.Make:
    return lambda backbone: delta(backbone, parameters, **changed)


@pytest.mark.parametrize(("family", "parameters"), CASES)
class TestLaws:
    def test_starts_as_identity(self, family: str, parameters: list[str]) -> None:
        laws.starts_as_identity(maker(parameters), family)

    def test_unplugs_exactly(self, family: str, parameters: list[str]) -> None:
        laws.unplugs_exactly(maker(parameters), family)

    def test_rows_are_their_own(self, family: str, parameters: list[str]) -> None:
        laws.rows_are_their_own(maker(parameters), family)

    def test_only_the_brick_learns(self, family: str, parameters: list[str]) -> None:
        laws.only_the_brick_learns(maker(parameters), family)

    def test_round_trips(self, family: str, parameters: list[str]) -> None:
        laws.round_trips(maker(parameters, layers=[-1]), family)

    def test_recomputes_the_same(self, family: str, parameters: list[str]) -> None:
        laws.recomputes_the_same(maker(parameters), family)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generates_with_a_cache(family: str) -> None:
    laws.generates_with_a_cache(maker(["*norm", "attn.v.weight"]), family)


def changed_model(family: str, brick: Delta, backbone: Backbone) -> tuple[Any, dict[str, Tensor]]:
    """A plain model with the brick's deltas added to its parameters, and these by their names."""
    model = plain_model(family)
    touched = {}
    for site_name in brick.site_names:
        site = backbone.sites[site_name]
        for part in ("weight", "bias"):
            key = f"{site_name}.{part}".replace(".", "-")
            if key not in brick.delta:
                continue
            own = model.get_parameter(f"{site.module}.{part}")
            touched[f"{site.module}.{part}"] = own
            change = brick.delta[key].detach()
            with torch.no_grad():
                if site.transposed and part == "weight":
                    own = own.T
                if site.rows is not None:
                    ((start, stop),) = site.rows
                    own = own[start:stop]
                own += change
    return model, touched


@pytest.mark.parametrize(("family", "parameters"), CASES)
def test_equals_a_model_whose_parameters_are_changed(family: str, parameters: list[str]) -> None:
    """The parameters that the names say, all of them; logits and gradients as after the change."""
    backbone = tiny(family)
    brick = laws.random_brick(maker(parameters), backbone)
    naive, touched = changed_model(family, brick, backbone)
    stated = CHOICES[tuple(parameters)][family]
    assert set(touched) == {n for n, _ in naive.named_parameters() if re.fullmatch(stated, n)}

    laws.answers_like(naive, brick, backbone)
    for name in brick.site_names:
        site = backbone.sites[name]
        for part in ("weight", "bias"):
            key = f"{name}.{part}".replace(".", "-")
            if key in brick.delta and site.rows is None and not site.transposed:
                peer = touched[f"{site.module}.{part}"].grad
                torch.testing.assert_close(brick.delta[key].grad, peer, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_rounds_the_output_and_not_the_weight(family: str) -> None:
    """Above 1 bfloat16 steps by 1/128: a weight of 1.003 would be 1, and a step of 0.003 lost."""
    half, full = tiny(family, "bfloat16"), tiny(family)
    brick = delta(half, ["norm.weight"])
    name = brick.site_names[-1]
    with torch.no_grad():
        brick.delta[f"{name}.weight".replace(".", "-")].fill_(0.003)
    path = half.sites[name].module
    own, precise = half.model.get_submodule(path), full.model.get_submodule(path)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 32, half.hidden_size, generator=generator).bfloat16()
    with torch.inference_mode():
        bias = precise.bias if getattr(precise, "bias", None) is not None else 0
        normed = (precise(x.float()) - bias) / precise.weight
        before = own(x).float()
        with half.slots.plugged([brick]):
            step = own(x).float() - before
    assert (step * normed).sum() / normed.square().sum() == pytest.approx(0.003, rel=0.2)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_family_without_biases_says_what_to_choose(family: str) -> None:
    with pytest.raises(UserError, match=r"'bias'.*norm"):
        delta(tiny(family), ["bias"])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"brick\.parameters is empty"):
        delta(tiny("gpt2"), [])
    with pytest.raises(UserError, match="share numbers"):
        delta(tiny("gpt2"), ["attn.q.bias", "bias"])
    with pytest.raises(UserError, match=r"no site 'attn\.w'"):
        delta(tiny("gpt2"), ["attn.w.weight"])
    with pytest.raises(UserError, match="no linear map or norm"):
        delta(tiny("gpt2"), ["embed"])
