"""Data flow on models of our own, whose names say nothing: odd layouts, odd orders, traps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from cfm_train.backbone.flow import first, spread, view
from cfm_train.backbone.ranges import clip, minus, ranges_of, shifted, size
from cfm_train.backbone.sites import SiteMap, find_sites
from cfm_train.errors import UserError

HIDDEN, HEADS, HEAD = 12, 3, 4


class ToyConfig(PretrainedConfig):
    model_type = "toy"

    def __init__(self, kind: str = "plain", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind = kind


class Mixer(nn.Module):
    """Attention in many ways; ``a`` is always the query, ``b`` the key, ``c`` the value."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c, self.d = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.all = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.extra = nn.Linear(HIDDEN, HIDDEN)

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = (*x.shape[:2], HEADS, HEAD)
        if self.kind == "shuffled":  # key, value and query of one head; heads last to first
            parts = self.all(x).view(*x.shape[:2], HEADS, 3, HEAD).flip(2)
            return parts[..., 2, :], parts[..., 0, :], parts[..., 1, :]
        if self.kind == "even and odd":  # queries on even rows, keys and values after them
            y = self.all(x)
            even, odd = y[..., 0 : 2 * HIDDEN : 2], y[..., 1 : 2 * HIDDEN : 2]
            return even.reshape(heads), odd.reshape(heads), y[..., 2 * HIDDEN :].reshape(heads)
        if self.kind == "raw weights":
            a = torch.einsum("bth,oh->bto", x, self.a.weight)
            return a.view(heads), self.b(x).view(heads), self.c(x).view(heads)
        if self.kind == "joined":  # concatenated and split again
            y = torch.cat([self.c(x), self.a(x), self.b(x)], dim=-1).view(*x.shape[:2], 3, HIDDEN)
            return y[:, :, 1].view(heads), y[:, :, 2].view(heads), y[:, :, 0].view(heads)
        if self.kind == "written":  # into a buffer, piece by piece
            y = torch.zeros(*x.shape[:2], 2 * HIDDEN, device=x.device)
            y[..., :HIDDEN] = self.b(x)
            y[..., HIDDEN:].copy_(self.a(x))
            return y[..., HIDDEN:].view(heads), y[..., :HIDDEN].view(heads), self.c(x).view(heads)
        if self.kind == "one for two":
            shared = self.b(x).view(heads)
            return self.a(x).view(heads), shared, shared
        return self.a(x).view(heads), self.b(x).view(heads), self.c(x).view(heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.projected(x))  # [b, heads, t, head]
        if self.kind == "keys first":
            scores = torch.matmul(k, q.transpose(2, 3)).softmax(dim=2).transpose(2, 3)
        elif self.kind == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(dim=-1)
        else:
            scores = (q @ k.transpose(2, 3) / 2).tanh().softmax(dim=-1)
        mixed = (scores @ v).transpose(1, 2).reshape(x.shape)
        if self.kind == "two outputs":
            return self.d(mixed) + self.extra(mixed)
        return self.d(mixed)


class Thinker(nn.Module):
    """A feed-forward layer; ``e`` passes the activation function."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.e, self.f, self.g = nn.Linear(HIDDEN, 8), nn.Linear(HIDDEN, 8), nn.Linear(8, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swish by hand":
            e = self.e(x)
            return self.g(self.f(x) * (e * torch.sigmoid(1.7 * e)))
        if self.kind == "squared":
            return self.g(nn.functional.relu(self.e(x)).square())
        return self.g(nn.functional.silu(self.e(x)) * self.f(x))


class Step(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.w, self.x = Mixer(kind), Thinker(kind)
        self.y, self.z = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.w(self.y(x))
        return x + self.x(self.z(x))


class Toy(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.positions = nn.Embedding(9, HIDDEN)
        self.words = nn.Embedding(50, HIDDEN)
        self.steps = nn.ModuleList(Step(config.kind) for _ in range(2))
        self.post_init()

    def forward(self, input_ids: Tensor) -> BaseModelOutput:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden = self.words(input_ids) + self.positions(places)
        for step in self.steps:
            hidden = step(hidden)
        return BaseModelOutput(last_hidden_state=hidden)


def sites_of(kind: str) -> SiteMap:
    return find_sites(Toy(ToyConfig(kind)))


PLAIN = {"attn.q": "w.a", "attn.k": "w.b", "attn.v": "w.c", "attn.o": "w.d"}


@pytest.mark.parametrize("kind", ["plain", "keys first", "einsum", "joined", "written"])
def test_roles_follow_the_data(kind: str) -> None:
    sites = sites_of(kind)
    for number in range(2):
        for role, module in PLAIN.items():
            site = sites[f"layer.{number}.{role}"]
            assert (site.module, site.rows) == (f"steps.{number}.{module}", None), role
    assert sites["embed"].module == "words"
    assert sites["layer.1.norm.0"].module == "steps.1.y"
    assert sites.layers == {"": 2}


def test_rows_of_a_shuffled_projection() -> None:
    sites = sites_of("shuffled")
    assert sites["layer.0.attn.k"].rows == ((0, 4), (12, 16), (24, 28))
    assert sites["layer.0.attn.v"].rows == ((4, 8), (16, 20), (28, 32))
    assert sites["layer.0.attn.q"].rows == ((8, 12), (20, 24), (32, 36))
    assert sites["layer.0.attn.qkv"].rows is None


def test_rows_that_alternate() -> None:
    sites = sites_of("even and odd")
    assert sites["layer.0.attn.q"].rows == tuple((i, i + 1) for i in range(0, 24, 2))
    assert sites["layer.0.attn.k"].rows == tuple((i, i + 1) for i in range(1, 24, 2))
    assert sites["layer.0.attn.v"].rows == ((24, 36),)
    assert sites["layer.0.attn.q"].out_features == 12


@pytest.mark.parametrize("kind", ["plain", "swish by hand"])
def test_gate_passes_the_activation_and_up_does_not(kind: str) -> None:
    sites = sites_of(kind)
    assert sites["layer.0.ffn.gate"].module == "steps.0.x.e"
    assert sites["layer.0.ffn.up"].module == "steps.0.x.f"
    assert sites["layer.0.ffn.down"].module == "steps.0.x.g"


def test_alone_it_is_up() -> None:
    sites = sites_of("squared")
    assert sites["layer.0.ffn.up"].module == "steps.0.x.e"
    assert "layer.0.ffn.gate" not in sites


def test_a_weight_that_is_used_past_its_module_has_no_slot() -> None:
    sites = sites_of("raw weights")
    with pytest.raises(UserError, match=r"'layer\.0\.attn\.q' is computed inside of 'steps\.0\.w"):
        sites.select(["attn.q"])
    assert sites["layer.0.attn.k"].module == "steps.0.w.b"


def test_one_projection_in_two_roles_is_ambiguous() -> None:
    sites = sites_of("one for two")
    for role in ("k", "v"):
        with pytest.raises(UserError, match=rf"attn\.{role}' of 'Toy' is ambiguous .*w\.b"):
            sites.select([f"attn.{role}"])
    assert sites["layer.0.attn.q"].module == "steps.0.w.a"


def test_two_output_projections_are_ambiguous() -> None:
    with pytest.raises(UserError, match=r"attn\.o' of 'Toy' is ambiguous .*w\.d.*w\.extra"):
        sites_of("two outputs").select(["attn.o"])


def test_the_model_that_is_asked_stays_as_it_is() -> None:
    model = Toy(ToyConfig())
    before = {name: (p.device, p.data_ptr()) for name, p in model.named_parameters()}
    attention = model.config._attn_implementation
    find_sites(model)
    assert {name: (p.device, p.data_ptr()) for name, p in model.named_parameters()} == before
    assert model.config._attn_implementation == attention
    assert not model.steps[0].w.a._forward_hooks


# -- the algebra under it --------------------------------------------------------------------------


def test_ranges() -> None:
    ranges = ranges_of(torch.tensor([[-1, 3, 4], [4, 5, 9]]))
    assert ranges == ((3, 6), (9, 10))
    assert ranges_of(torch.tensor([-1])) == ranges_of(None) == ()
    assert ranges_of(torch.tensor([], dtype=torch.int32)) == ()
    assert size(ranges) == 4
    assert clip(ranges, 4, 9) == ((4, 6),)
    assert minus(ranges, ((4, 5),)) == ((3, 4), (5, 6), (9, 10))
    assert minus(ranges, ranges) == ()
    assert shifted(ranges, -3) == ((0, 3), (6, 7))


def test_minus_is_that_of_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        a, b = (torch.randint(0, 20, (8,), generator=generator) for _ in range(2))
        expected = sorted(set(a.tolist()) - set(b.tolist()))
        found = [i for start, stop in minus(ranges_of(a), ranges_of(b)) for i in range(start, stop)]
        assert sorted(found) == expected


def test_labels_of_a_view_are_the_view_of_the_labels() -> None:
    tensor = torch.empty(2, 6, device="meta")
    labels = torch.arange(12, dtype=torch.int32).view(2, 6)
    flat = spread(labels, tensor, None)
    part = tensor[:, 1:5].view(2, 2, 2).transpose(0, 2)
    found = view(flat, part)
    assert found is not None
    assert torch.equal(found, labels[:, 1:5].reshape(2, 2, 2).transpose(0, 2))


def test_a_write_into_a_part_keeps_the_rest() -> None:
    tensor = torch.empty(4, device="meta")
    flat = spread(torch.arange(4, dtype=torch.int32), tensor, None)
    flat = spread(torch.tensor([9, 8], dtype=torch.int32), tensor[1:3], flat)
    assert flat.tolist() == [0, 9, 8, 3]


def test_first_label_of_broadcast_inputs() -> None:
    one = torch.tensor([[1, -1]], dtype=torch.int32)
    two = torch.tensor([[5], [6]], dtype=torch.int32)
    shape = torch.Size([2, 2])
    found = first([None, one, two, torch.zeros(3, dtype=torch.int32)], shape)
    assert found is not None
    assert found.tolist() == [[1, 5], [1, 6]]
    assert first([None], shape) is None
