"""Bottleneck adapters: the laws of every kind, and replaced modules in a plain model as oracle."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.bottleneck import Bottleneck
from cfm_train.errors import UserError
from tests import brick_laws as laws
from tests.backbones import FAMILIES, batch, plain_model, tiny

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")


def adapter(backbone: Backbone, placement: str, **changed: Any) -> Bottleneck:
    hyper = {
        "placement": placement,
        "bottleneck": 6,
        "activation": "gelu",
        "scale": 1.5,
        "layers": None,
    }
    return Bottleneck(**hyper | changed).build(backbone)


def maker(placement: str, **changed: Any) -> laws.Make:
    return lambda backbone: adapter(backbone, placement, **changed)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
class TestLaws:
    def test_starts_as_identity(self, family: str, placement: str) -> None:
        laws.starts_as_identity(maker(placement), family)

    def test_unplugs_exactly(self, family: str, placement: str) -> None:
        laws.unplugs_exactly(maker(placement), family)

    def test_rows_are_their_own(self, family: str, placement: str) -> None:
        laws.rows_are_their_own(maker(placement), family)

    def test_only_the_brick_learns(self, family: str, placement: str) -> None:
        laws.only_the_brick_learns(maker(placement), family)

    def test_round_trips(self, family: str, placement: str) -> None:
        laws.round_trips(maker(placement, layers=[-1]), family)

    def test_recomputes_the_same(self, family: str, placement: str) -> None:
        laws.recomputes_the_same(maker(placement), family)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generates_with_a_cache(family: str, placement: str) -> None:
    laws.generates_with_a_cache(maker(placement), family)


class Network(nn.Module):
    """An adapter as its papers draw it: two linear layers with something between."""

    def __init__(self, brick: Bottleneck, site: str, activation: nn.Module) -> None:
        super().__init__()
        key = site.replace(".", "-")
        self.inner = nn.Linear(*reversed(brick.down[key].shape))
        self.outer = nn.Linear(*reversed(brick.up[key].shape))
        self.load_state_dict(
            {
                "inner.weight": brick.down[key].detach(),
                "inner.bias": brick.down_bias[key].detach(),
                "outer.weight": brick.up[key].detach(),
                "outer.bias": brick.up_bias[key].detach(),
            }
        )
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.outer(self.activation(self.inner(x)))


class After(nn.Module):
    """A module with an adapter on its output."""

    def __init__(self, module: nn.Module, network: Network) -> None:
        super().__init__()
        self.module, self.network = module, network

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x)
        return y + self.network(y)

    @property
    def weight(self) -> Tensor:  # T5 looks at the dtype of its last map
        return self.module.weight  # type: ignore[return-value]


class Beside(nn.Module):
    """A feed-forward with an adapter from its input to its output."""

    def __init__(self, module: nn.Module, network: Network) -> None:
        super().__init__()
        self.module, self.network = module, network

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) + self.network(x)


def _beside_bert(layer: Any, network: Network) -> None:
    """BERT's feed-forward ends inside a module that adds the residual and normalises."""

    def feed_forward_chunk(self: Any, x: Tensor) -> Tensor:
        y = self.output.dense(self.intermediate(x)) + network(x)
        return self.output.LayerNorm(y + x)

    layer.feed_forward_chunk = types.MethodType(feed_forward_chunk, layer)


def _places(family: str, model: Any) -> list[tuple[str, dict[str, Any], Any, Any]]:
    """For every layer its name, and (owner, attribute) of attention's o, of down, of the FFN."""
    if family == "bert":
        return [
            (f"layer.{i}", {"attn": (b.attention.output, "dense")}, (b.output, "dense"), b)
            for i, b in enumerate(model.encoder.layer)
        ]
    if family == "llama":
        return [
            (f"layer.{i}", {"attn": (b.self_attn, "o_proj")}, (b.mlp, "down_proj"), (b, "mlp"))
            for i, b in enumerate(model.model.layers)
        ]
    if family == "gpt2":
        return [
            (f"layer.{i}", {"attn": (b.attn, "c_proj")}, (b.mlp, "c_proj"), (b, "mlp"))
            for i, b in enumerate(model.transformer.h)
        ]
    places = []
    for stack in ("encoder", "decoder"):
        for i, block in enumerate(getattr(model, stack).block):
            parts = {"attn": (block.layer[0].SelfAttention, "o")}
            if stack == "decoder":
                parts["cross"] = (block.layer[1].EncDecAttention, "o")
            last = block.layer[-1]
            places.append(
                (
                    f"{stack}.layer.{i}",
                    parts,
                    (last.DenseReluDense, "wo"),
                    (last, "DenseReluDense"),
                )
            )
    return places


def replaced(
    family: str, brick: Bottleneck, activation: nn.Module
) -> tuple[Any, dict[str, Network]]:
    """A plain transformers model with the brick's adapters built into its modules."""
    model = plain_model(family)
    placement = brick.hyper["placement"]
    networks: dict[str, Network] = {}

    def network(site: str) -> Network:
        networks[site] = Network(brick, site, activation)
        return networks[site]

    for name, attentions, (owner, attribute), whole in _places(family, model):
        down = f"{name}.ffn.down"
        if placement == "parallel":
            if family == "bert":
                _beside_bert(whole, network(down))
            else:
                setattr(*whole, Beside(getattr(*whole), network(down)))
            continue
        setattr(owner, attribute, After(getattr(owner, attribute), network(down)))
        for kind, place in attentions.items() if placement == "houlsby" else ():
            setattr(*place, After(getattr(*place), network(f"{name}.{kind}.o")))
    return model, networks


@pytest.mark.parametrize(
    ("activation", "module"),
    [("gelu", nn.GELU()), ("relu", nn.ReLU()), ("silu", nn.SiLU()), ("tanh", nn.Tanh())],
)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_replaced_modules(
    family: str, placement: str, activation: str, module: nn.Module
) -> None:
    """Logits and every parameter's gradient."""
    backbone = tiny(family)
    brick = laws.random_brick(maker(placement, activation=activation), backbone)
    naive, networks = replaced(family, brick, module)
    assert set(networks) == set(brick.site_names)

    laws.answers_like(naive, brick, backbone)
    for site, network in networks.items():
        key = site.replace(".", "-")
        for own, peer in (
            (brick.down, network.inner.weight),
            (brick.down_bias, network.inner.bias),
            (brick.up, network.outer.weight),
            (brick.up_bias, network.outer.bias),
        ):
            torch.testing.assert_close(own[key].grad, peer.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_placements_and_low_rank_together(family: str) -> None:
    """Three kinds of places and a LoRA in one batch, each for its own row."""
    from tests.lora_cases import lora

    backbone = tiny(family)
    inputs = batch(backbone, rows=4)
    makes = [*map(maker, PLACEMENTS), lambda b: lora(b, sites=["ffn.up", "ffn.down", "attn.o"])]
    bricks = [laws.random_brick(make, backbone, seed) for seed, make in enumerate(makes)]
    mixed = laws.plugged(backbone, bricks, inputs, list(torch.eye(4)))
    for row, brick in enumerate(bricks):
        alone = laws.plugged(backbone, [brick], inputs)
        torch.testing.assert_close(mixed[row], alone[row], atol=1e-5, rtol=0)


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="no layer 7"):
        adapter(tiny("llama"), "houlsby", layers=[7])
