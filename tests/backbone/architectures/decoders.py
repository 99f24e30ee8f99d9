"""Decoders: language models that read from left to right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as tf

from architectures.truth import GROUPED, SMALL, Architecture, Place, fused, in_layers

GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64} | {
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FALCON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LLAMA_ATTENTION: dict[str, Place] = {
    "attn": "self_attn",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
}
LLAMA_NORMS: dict[str, Place] = {
    "norm.0": "input_layernorm",
    "norm.1": "post_attention_layernorm",
}
LLAMA_LAYER: dict[str, Place] = {
    **LLAMA_ATTENTION,
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
    **LLAMA_NORMS,
}
LLAMA_AROUND: dict[str, Place] = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
}
#: NeoX, BLOOM and the first Falcon: q, k and v of one head lie side by side.
INTERLEAVED = {
    "q": ((0, 8), (24, 32), (48, 56), (72, 80)),
    "k": ((8, 16), (32, 40), (56, 64), (80, 88)),
    "v": ((16, 24), (40, 48), (64, 72), (88, 96)),
}


def _bloom_layer(**rows: Any) -> dict[str, Place]:
    return {
        "attn": "self_attention",
        **fused("self_attention.query_key_value", **rows),
        "attn.o": "self_attention.dense",
        "ffn.up": "mlp.dense_h_to_4h",
        "ffn.down": "mlp.dense_4h_to_h",
    }


BLOOM_AROUND: dict[str, Place] = {
    "embed": "transformer.word_embeddings",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}


def _like_llama(
    config: Callable[[], Any],
    sites: dict[str, Place] = LLAMA_LAYER,
    *,
    head_dim: int = 8,
    kv: bool = True,
) -> Architecture:
    """Llama's module names, two key-value heads for four query heads."""
    return Architecture(
        tf.AutoModelForCausalLM,
        config,
        in_layers("model.layers.{i}", sites),
        LLAMA_AROUND,
        (4, 2, head_dim),
        kv,
    )


def _like_gpt2(
    config: Callable[[], Any], heads: tuple[int, int, int] = (4, 4, 8), **rows: Any
) -> Architecture:
    return Architecture(
        tf.AutoModelForCausalLM,
        config,
        in_layers(
            "transformer.h.{i}",
            {
                "attn": "attn",
                **fused("attn.c_attn", **rows),
                "attn.o": "attn.c_proj",
                "ffn.up": "mlp.c_fc",
                "ffn.down": "mlp.c_proj",
                "norm.0": "ln_1",
                "norm.1": "ln_2",
            },
        ),
        {"embed": "transformer.wte", "norm": "transformer.ln_f", "head": "lm_head"},
        heads,
    )


DECODERS: dict[str, Architecture] = {
    "llama": _like_llama(lambda: tf.LlamaConfig(**GROUPED)),
    "mistral": _like_llama(lambda: tf.MistralConfig(**GROUPED)),
    "qwen2": _like_llama(lambda: tf.Qwen2Config(**GROUPED)),
    # Heads wider than hidden_size / heads, and norms on queries and keys.
    "qwen3": _like_llama(lambda: tf.Qwen3Config(**GROUPED, head_dim=16), head_dim=16),
    # Soft caps on scores and logits; four norms.
    "gemma2": _like_llama(
        lambda: tf.Gemma2Config(**GROUPED, head_dim=16),
        LLAMA_LAYER
        | {"norm.2": "pre_feedforward_layernorm", "norm.3": "post_feedforward_layernorm"},
        head_dim=16,
        kv=False,
    ),
    "phi3": Architecture(
        tf.AutoModelForCausalLM,
        lambda: tf.Phi3Config(**GROUPED),
        in_layers(
            "model.layers.{i}",
            {
                "attn": "self_attn",
                **fused("self_attn.qkv_proj", k=((32, 48),), v=((48, 64),)),
                "attn.o": "self_attn.o_proj",
                "ffn.gate": ("mlp.gate_up_proj", ((0, 48),)),
                "ffn.up": ("mlp.gate_up_proj", ((48, 96),)),
                "ffn.gate_up": "mlp.gate_up_proj",
                "ffn.down": "mlp.down_proj",
                **LLAMA_NORMS,
            },
        ),
        LLAMA_AROUND,
        (4, 2, 8),
    ),
    "gpt2": _like_gpt2(lambda: tf.GPT2Config(**GPT)),
    "gpt-bigcode": _like_gpt2(
        lambda: tf.GPTBigCodeConfig(**GPT), (4, 1, 8), k=((32, 40),), v=((40, 48),)
    ),
    "gpt-neox": Architecture(
        tf.AutoModelForCausalLM,
        lambda: tf.GPTNeoXConfig(**SMALL, bos_token_id=1, eos_token_id=2),
        in_layers(
            "gpt_neox.layers.{i}",
            {
                "attn": "attention",
                **fused("attention.query_key_value", **INTERLEAVED),
                "attn.o": "attention.dense",
                "ffn.up": "mlp.dense_h_to_4h",
                "ffn.down": "mlp.dense_4h_to_h",
                **LLAMA_NORMS,
            },
        ),
        {"embed": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "lm_head"},
    ),
    "opt": Architecture(
        tf.AutoModelForCausalLM,
        lambda: tf.OPTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            vocab_size=64,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
            pad_token_id=1,
        ),
        in_layers(
            "model.decoder.layers.{i}",
            LLAMA_ATTENTION
            | {
                "attn.o": "self_attn.out_proj",
                "ffn.up": "fc1",
                "ffn.down": "fc2",
                "norm.0": "self_attn_layer_norm",
                "norm.1": "final_layer_norm",
            },
        ),
        {
            "embed": "model.decoder.embed_tokens",
            "norm": "model.decoder.final_layer_norm",
            "head": "lm_head",
        },
    ),
    # One key and value for all heads; attention and feed-forward side by side.
    "falcon": Architecture(
        tf.AutoModelForCausalLM,
        lambda: tf.FalconConfig(**FALCON),
        in_layers(
            "transformer.h.{i}",
            _bloom_layer(k=((32, 40),), v=((40, 48),)) | {"norm.0": "input_layernorm"},
        ),
        BLOOM_AROUND,
        (4, 1, 8),
        kv=False,
    ),
    # Groups of two queries, one key, one value.
    "falcon-grouped": Architecture(
        tf.AutoModelForCausalLM,
        lambda: tf.FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True),
        in_layers(
            "transformer.h.{i}",
            _bloom_layer(q=((0, 16), (32, 48)), k=((16, 24), (48, 56)), v=((24, 32), (56, 64)))
            | {"norm.0": "ln_attn", "norm.1": "ln_mlp"},
        ),
        BLOOM_AROUND,
        (4, 2, 8),
        kv=False,
    ),
    "bloom": Architecture(
        tf.AutoModelForCausalLM,
        lambda: tf.BloomConfig(
            hidden_size=32, n_layer=2, n_head=4, vocab_size=64, pad_token_id=0, eos_token_id=2
        ),
        in_layers(
            "transformer.h.{i}",
            _bloom_layer(**INTERLEAVED) | LLAMA_NORMS,
        ),
        BLOOM_AROUND | {"embed_norm": "transformer.word_embeddings_layernorm"},
        kv=False,
    ),
    # The experts' weights are three-dimensional: the mixture as a whole has a site.
    "mixtral": _like_llama(
        lambda: tf.MixtralConfig(**GROUPED, num_local_experts=4),
        LLAMA_ATTENTION | {"ffn.experts": "mlp.experts", **LLAMA_NORMS},
    ),
}
