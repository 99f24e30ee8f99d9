"""Sites on every architecture, against tables written by hand, and what the data then do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, GROUPED, SMALL
from torch import Tensor, nn

from cfm_train.backbone.sites import AttentionSite, Site, SiteMap, find_sites
from cfm_train.errors import UserError

EVERY = pytest.mark.parametrize("name", ARCHITECTURES)


@cache
def model_of(name: str) -> Any:
    """A tiny random model in float64, eager attention, every weight far from a special value."""
    torch.manual_seed(0)
    entry = ARCHITECTURES[name]
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = entry.auto.from_config(entry.config(), **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@cache
def sites_of(name: str) -> SiteMap:
    return find_sites(model_of(name))


@EVERY
def test_sites_are_where_the_modelling_code_has_them(name: str) -> None:
    expected = ARCHITECTURES[name].expected()
    found = {
        s.name: s.module if s.rows is None else (s.module, s.rows) for s in sites_of(name).values()
    }
    assert found == expected


@EVERY
def test_shapes_are_those_of_the_weights(name: str) -> None:
    model = model_of(name)
    for site in sites_of(name).values():
        if site.kind not in ("linear", "conv1d", "head"):
            continue
        module = model.get_submodule(site.module)
        weight = module.weight.T if site.kind == "conv1d" else module.weight
        rows = weight.shape[0] if site.rows is None else sum(b - a for a, b in site.rows)
        assert (site.out_features, site.in_features) == (rows, weight.shape[1]), site
        assert site.transposed == isinstance(module, tf.pytorch_utils.Conv1D)
        assert site.bias == (module.bias is not None)


@EVERY
def test_embedding_and_head_are_those_that_transformers_names(name: str) -> None:
    model, sites = model_of(name), sites_of(name)
    embed = next(s for s in sites.values() if s.kind == "embed")
    weight = model.get_submodule(embed.module).weight
    assert weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert (embed.in_features, embed.out_features) == tuple(weight.shape)
    head = model.get_output_embeddings()
    assert ("head" in sites) == (head is not None)
    if head is not None:
        assert model.get_submodule(sites["head"].module) is head


@EVERY
def test_attention_has_the_heads_of_the_config(name: str) -> None:
    entry, sites = ARCHITECTURES[name], sites_of(name)
    attention = [s for s in sites.values() if isinstance(s, AttentionSite)]
    assert len(attention) == sum(sites.layers.values()) + sites.layers.get("decoder.", 0)
    for site in attention:
        assert (site.heads, site.kv_heads, site.head_dim) == entry.heads
        assert site.value_dim == site.head_dim
        assert site.kv == entry.kv
    assert sites.hidden_size == 32
    assert set(sites.layers.values()) == {entry.layers}


# -- what the sites do when the model runs ---------------------------------------------------------

TOKENS, AT = 6, 2


@contextmanager
def changed(model: Any, site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replaces a site's output by ``change(output)`` while the model runs."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        for start, stop in site.rows or ((0, output.shape[-1]),):
            part = output[..., start:stop]
            # Some modules see the tokens of all rows in one dimension.
            output[..., start:stop] = change(part.reshape(1, -1, part.shape[-1])).view_as(part)
        return output

    handle = model.get_submodule(site.module).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def seen_by(model: Any, site: Site, tokens: int) -> Tensor:
    """The input ``[1, tokens, in_features]`` of a site in a forward pass, at its first call."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any) -> None:
        seen.append(args[0].detach().clone())

    ids = torch.arange(5, 5 + tokens)[None]
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids + 20
    handle = model.get_submodule(site.module).register_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            model(**inputs, use_cache=False) if _caches(model) else model(**inputs)
    finally:
        handle.remove()
    return seen[0].reshape(1, tokens, -1)


def _caches(model: Any) -> bool:
    return hasattr(model.config, "use_cache")


def noise(part: Tensor) -> Tensor:
    torch.manual_seed(1)
    return part + torch.randn_like(part)


def noise_at(part: Tensor) -> Tensor:
    part = part.clone()
    part[:, AT] = noise(part[:, AT])
    return part


def attentions() -> list[tuple[str, str]]:
    blocks = []
    for name in ARCHITECTURES:
        sites = ARCHITECTURES[name].expected()
        blocks += [(name, s[: -len(".q")]) for s in sites if s.endswith(("0.attn.q", "0.cross.q"))]
    return blocks


@pytest.mark.parametrize(("name", "block"), attentions())
def test_v_is_all_that_attention_passes_on(name: str, block: str) -> None:
    model, sites = model_of(name), sites_of(name)
    with changed(model, sites[f"{block}.v"], torch.zeros_like):
        assert not seen_by(model, sites[f"{block}.o"], TOKENS).any()


@pytest.mark.parametrize(("name", "block"), attentions())
def test_q_and_k_only_decide_where_to_look(name: str, block: str) -> None:
    """With one token there is one place to look at: q and k cannot matter, v does."""
    model, sites = model_of(name), sites_of(name)
    bare = seen_by(model, sites[f"{block}.o"], 1)
    for role in "qk":
        with changed(model, sites[f"{block}.{role}"], noise):
            assert torch.equal(seen_by(model, sites[f"{block}.o"], 1), bare), role
    with changed(model, sites[f"{block}.v"], noise):
        assert not torch.equal(seen_by(model, sites[f"{block}.o"], 1), bare)


@pytest.mark.parametrize(("name", "block"), attentions())
def test_q_is_the_one_that_looks_and_k_the_one_looked_at(name: str, block: str) -> None:
    """A query changes the answer at its own token, a key at tokens that see it."""
    model, sites = model_of(name), sites_of(name)
    bare = seen_by(model, sites[f"{block}.o"], TOKENS)
    with changed(model, sites[f"{block}.q"], noise_at):
        moved = (seen_by(model, sites[f"{block}.o"], TOKENS) != bare).any(dim=-1)[0]
    assert moved.tolist() == [i == AT for i in range(TOKENS)]
    with changed(model, sites[f"{block}.k"], noise_at):
        moved = (seen_by(model, sites[f"{block}.o"], TOKENS) != bare).any(dim=-1)[0]
    assert moved[AT + 1 :].all()


@pytest.mark.parametrize(
    "name", [n for n, a in ARCHITECTURES.items() if any("ffn.up" in s for s in a.layer)]
)
def test_up_is_multiplied_and_gate_goes_through_the_activation(name: str) -> None:
    model, sites = model_of(name), sites_of(name)
    ups = [s for s in sites if s.endswith("0.ffn.up")]
    for up in ups:
        down, gate = sites[up.replace("up", "down")], up.replace("up", "gate")
        bare = seen_by(model, down, TOKENS)
        for role in [up, gate] if gate in sites else [up]:
            with changed(model, sites[role], torch.zeros_like):
                assert not seen_by(model, down, TOKENS).any(), role
        with changed(model, sites[up], lambda part: 2 * part):
            doubled = torch.allclose(seen_by(model, down, TOKENS), 2 * bare, rtol=1e-12)
        relu = getattr(
            model.config, "dense_act_fn", getattr(model.config, "activation_function", "")
        )
        assert doubled == (gate in sites or relu == "relu")
        if gate in sites:
            with changed(model, sites[gate], lambda part: 2 * part):
                assert not torch.allclose(seen_by(model, down, TOKENS), 2 * bare, rtol=1e-6)


# -- what is refused -------------------------------------------------------------------------------


def meta(auto: Any, config: Any) -> Any:
    with torch.device("meta"):
        return auto.from_config(config)


def test_experts_are_refused_by_name() -> None:
    sites = sites_of("mixtral")
    for pattern in ("ffn.down", "ffn.*", "layer.0.ffn.gate"):
        with pytest.raises(UserError, match=r"experts of 'layer\.0'.*mlp\.experts"):
            sites.select([pattern])
    with pytest.raises(UserError, match="three-dimensional"):
        sites["layer.1.ffn.up"]
    assert len(sites.select(["attn.*"])) == 8


def test_a_shared_expert_is_not_taken_for_the_feed_forward() -> None:
    config = tf.Qwen2MoeConfig(
        **GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
    )
    sites = find_sites(meta(tf.AutoModelForCausalLM, config))
    assert sites["layer.1.ffn.shared.down"].module == "model.layers.1.mlp.shared_expert.down_proj"
    assert sites["layer.1.ffn.experts"].module == "model.layers.1.mlp.experts"
    with pytest.raises(UserError, match="three-dimensional"):
        sites.select(["ffn.down"])


def test_a_key_from_two_projections_is_ambiguous() -> None:
    config = tf.DeepseekV3Config(
        **SMALL,
        num_key_value_heads=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=6,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    )
    sites = find_sites(meta(tf.AutoModelForCausalLM, config))
    with pytest.raises(UserError, match=r"attn\.k.*ambiguous.*kv_a_proj_with_mqa.*kv_b_proj"):
        sites.select(["attn.k"])
    # Per head 4 rows of keys and 6 of values.
    assert sites["layer.0.attn.v"].rows == ((4, 10), (14, 20), (24, 30), (34, 40))
    attention = sites["layer.0.attn"]
    assert isinstance(attention, AttentionSite)
    assert (attention.kv_heads, attention.head_dim, attention.value_dim) == (4, 8, 6)


def test_several_feed_forwards_in_a_layer_are_ambiguous() -> None:
    config = tf.MobileBertConfig(
        **{**SMALL, "hidden_size": 64}, intra_bottleneck_size=32, embedding_size=16
    )
    sites = find_sites(meta(tf.AutoModel, config))
    assert sites.hidden_size == 64
    assert sites["layer.0.attn.q"].module == "encoder.layer.0.attention.self.query"
    with pytest.raises(UserError, match=r"ffn\.up.*ambiguous.*ffn\.0\.output\.dense"):
        sites.select(["ffn.up"])


def test_a_model_without_attention_is_refused() -> None:
    config = tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64)
    with pytest.raises(UserError, match=r"MambaForCausalLM.*no attention"):
        find_sites(meta(tf.AutoModelForCausalLM, config))


def test_a_model_that_needs_values_is_refused() -> None:
    config = tf.XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=48, vocab_size=64)
    with pytest.raises(UserError, match=r"XLNetModel.*without values"):
        find_sites(meta(tf.AutoModel, config))


def test_an_output_gate_beside_the_queries_is_no_part_of_them() -> None:
    """Qwen3-Next projects queries and a gate of the attention's output with one matrix."""
    config = tf.Qwen3NextConfig(
        **GROUPED,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    )
    sites = find_sites(meta(tf.AutoModelForCausalLM, config))
    assert sites["layer.1.attn.q"].rows == ((0, 8), (16, 24), (32, 40), (48, 56))
    assert "layer.0.attn.q" not in sites
    assert sites.layers == {"": 2}


def test_sites_of_a_large_model_are_found_without_its_weights() -> None:
    config = tf.LlamaConfig(num_hidden_layers=24, hidden_size=8192, intermediate_size=28672)
    sites = find_sites(meta(tf.AutoModelForCausalLM, config))
    assert sites["layer.23.ffn.down"].in_features == 28672
    assert sites["layer.23"].kind == "layer"
