"""Tiny configs of many architectures, and where their sites are: written down by hand.

Paths were read off transformers' modelling code, row ranges off the lines that split a projection.
``{i}`` stands for the layer's number; (path, rows) for a part of a fused module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers as tf

Place = str | tuple[str, tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class Architecture:
    """A tiny random model and the truth about it.

    Attributes:
        auto: the class that makes it from a config.
        config: makes the config.
        layer: sites of each layer, without the prefix ``layer.{i}.``.
        around: all other sites.
        heads: query heads, key-value heads, head size.
        kv: whether keys and values can be plugged into its attention.
        layers: number of layers (of each stack).
    """

    auto: Any
    config: Callable[[], Any]
    layer: dict[str, Place]
    around: dict[str, Place]
    heads: tuple[int, int, int] = (4, 4, 8)
    kv: bool = True
    layers: int = 2
    cross: dict[str, Place] = field(default_factory=dict)

    def expected(self) -> dict[str, Place]:
        """Every site by its full name."""
        sites = dict(self.around)
        for number in range(self.layers):
            for name, place in self.layer.items():
                where, rows = (place, None) if isinstance(place, str) else place
                where = where.format(i=number)
                name = name.format(i=number)
                sites[name] = where if rows is None else (where, rows)
        return sites


def _in_layer(stack: str, sites: dict[str, Place]) -> dict[str, Place]:
    return {
        f"{stack}layer.{{i}}" + (f".{name}" if name else ""): place for name, place in sites.items()
    }


def _under(prefix: str, sites: dict[str, Place]) -> dict[str, Place]:
    def moved(tail: str) -> str:
        return f"{prefix}.{tail}".rstrip(".")

    return {
        name: moved(place) if isinstance(place, str) else (moved(place[0]), place[1])
        for name, place in sites.items()
    }


def _layer(prefix: str, sites: dict[str, Place], stack: str = "") -> dict[str, Place]:
    return _in_layer(stack, _under(prefix, {"": "", **sites}))


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64} | {
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 48, "vocab_size": 64}
FALCON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

BERT_LAYER: dict[str, Place] = {
    "attn": "attention.self",
    "attn.q": "attention.self.query",
    "attn.k": "attention.self.key",
    "attn.v": "attention.self.value",
    "attn.o": "attention.output.dense",
    "ffn.up": "intermediate.dense",
    "ffn.down": "output.dense",
    "norm.0": "attention.output.LayerNorm",
    "norm.1": "output.LayerNorm",
}
BERT_AROUND: dict[str, Place] = {
    "embed": "embeddings.word_embeddings",
    "embed_norm": "embeddings.LayerNorm",
}
LLAMA_ATTENTION: dict[str, Place] = {
    "attn": "self_attn",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
}
LLAMA_LAYER: dict[str, Place] = {
    **LLAMA_ATTENTION,
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
    "norm.0": "input_layernorm",
    "norm.1": "post_attention_layernorm",
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


def _fused(
    module: str, q: Any = ((0, 32),), k: Any = ((32, 64),), v: Any = ((64, 96),)
) -> dict[str, Place]:
    return {
        "attn.q": (module, q),
        "attn.k": (module, k),
        "attn.v": (module, v),
        "attn.qkv": module,
    }


def _bloom_layer(**rows: Any) -> dict[str, Place]:
    return {
        "attn": "self_attention",
        **_fused("self_attention.query_key_value", **rows),
        "attn.o": "self_attention.dense",
        "ffn.up": "mlp.dense_h_to_4h",
        "ffn.down": "mlp.dense_4h_to_h",
    }


BLOOM_AROUND: dict[str, Place] = {
    "embed": "transformer.word_embeddings",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}


def _t5(gated: bool) -> tuple[dict[str, Place], dict[str, Place]]:
    def attention(name: str, module: str) -> dict[str, Place]:
        return {name: module} | {f"{name}.{r}": f"{module}.{r}" for r in "qkvo"}

    def feed_forward(at: int) -> dict[str, Place]:
        base = f"layer.{at}.DenseReluDense"
        inner = (
            {"ffn.gate": f"{base}.wi_0", "ffn.up": f"{base}.wi_1"}
            if gated
            else {"ffn.up": f"{base}.wi"}
        )
        return {**inner, "ffn.down": f"{base}.wo"}

    encoder = {**attention("attn", "layer.0.SelfAttention"), **feed_forward(1)}
    encoder |= {f"norm.{j}": f"layer.{j}.layer_norm" for j in range(2)}
    decoder = {
        **attention("attn", "layer.0.SelfAttention"),
        **attention("cross", "layer.1.EncDecAttention"),
        **feed_forward(2),
    }
    decoder |= {f"norm.{j}": f"layer.{j}.layer_norm" for j in range(3)}
    layer = _layer("encoder.block.{i}", encoder, "encoder.")
    layer |= _layer("decoder.block.{i}", decoder, "decoder.")
    around: dict[str, Place] = {
        "encoder.embed": "encoder.embed_tokens",
        "decoder.embed": "decoder.embed_tokens",
        "encoder.norm": "encoder.final_layer_norm",
        "decoder.norm": "decoder.final_layer_norm",
        "head": "lm_head",
    }
    return layer, around


def _bart() -> dict[str, Place]:
    def attention(name: str, module: str) -> dict[str, Place]:
        roles = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
        return {name: module} | {f"{name}.{r}": f"{module}.{p}" for r, p in roles.items()}

    ffn: dict[str, Place] = {"ffn.up": "fc1", "ffn.down": "fc2"}
    encoder = {**attention("attn", "self_attn"), **ffn}
    encoder |= {"norm.0": "self_attn_layer_norm", "norm.1": "final_layer_norm"}
    decoder = {**attention("attn", "self_attn"), **attention("cross", "encoder_attn"), **ffn}
    decoder |= {
        "norm.0": "self_attn_layer_norm",
        "norm.1": "encoder_attn_layer_norm",
        "norm.2": "final_layer_norm",
    }
    layer = _layer("model.encoder.layers.{i}", encoder, "encoder.")
    return layer | _layer("model.decoder.layers.{i}", decoder, "decoder.")


ENCODER, DECODER, BOTH = tf.AutoModel, tf.AutoModelForCausalLM, tf.AutoModelForSeq2SeqLM

ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(
        ENCODER,
        lambda: tf.BertConfig(**SMALL),
        _layer("encoder.layer.{i}", BERT_LAYER),
        BERT_AROUND,
    ),
    "roberta": Architecture(
        ENCODER,
        lambda: tf.RobertaConfig(**SMALL),
        _layer("encoder.layer.{i}", BERT_LAYER),
        BERT_AROUND,
    ),
    "distilbert": Architecture(
        ENCODER,
        lambda: tf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=64),
        _layer(
            "transformer.layer.{i}",
            {
                "attn": "attention",
                "attn.q": "attention.q_lin",
                "attn.k": "attention.k_lin",
                "attn.v": "attention.v_lin",
                "attn.o": "attention.out_lin",
                "ffn.up": "ffn.lin1",
                "ffn.down": "ffn.lin2",
                "norm.0": "sa_layer_norm",
                "norm.1": "output_layer_norm",
            },
        ),
        BERT_AROUND,
    ),
    # One set of weights runs twice: one layer. The embedding is narrower than the layers.
    "albert": Architecture(
        ENCODER,
        lambda: tf.AlbertConfig(**SMALL, embedding_size=16),
        _layer(
            "encoder.albert_layer_groups.{i}",
            {
                "attn": "albert_layers.0.attention",
                "attn.q": "albert_layers.0.attention.query",
                "attn.k": "albert_layers.0.attention.key",
                "attn.v": "albert_layers.0.attention.value",
                "attn.o": "albert_layers.0.attention.dense",
                "ffn.up": "albert_layers.0.ffn",
                "ffn.down": "albert_layers.0.ffn_output",
                "norm.0": "albert_layers.0.attention.LayerNorm",
                "norm.1": "albert_layers.0.full_layer_layer_norm",
            },
        ),
        {"embed": "embeddings.word_embeddings"},
        layers=1,
    ),
    "electra": Architecture(
        ENCODER,
        lambda: tf.ElectraConfig(**SMALL, embedding_size=16),
        _layer("encoder.layer.{i}", BERT_LAYER),
        {"embed": "embeddings.word_embeddings"},
    ),
    "deberta-v2": Architecture(
        ENCODER,
        lambda: tf.DebertaV2Config(
            **SMALL,
            relative_attention=True,
            position_buckets=8,
            pos_att_type="p2c|c2p",
            share_att_key=True,
            norm_rel_ebd="layer_norm",
        ),
        _layer(
            "encoder.layer.{i}",
            BERT_LAYER
            | {
                "attn.q": "attention.self.query_proj",
                "attn.k": "attention.self.key_proj",
                "attn.v": "attention.self.value_proj",
            },
        ),
        BERT_AROUND,
        kv=False,
    ),
    "modernbert": Architecture(
        ENCODER,
        lambda: tf.ModernBertConfig(
            **SMALL, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2
        ),
        _layer(
            "layers.{i}",
            {
                "attn": "attn",
                **_fused("attn.Wqkv"),
                "attn.o": "attn.Wo",
                "ffn.gate": ("mlp.Wi", ((0, 48),)),
                "ffn.up": ("mlp.Wi", ((48, 96),)),
                "ffn.gate_up": "mlp.Wi",
                "ffn.down": "mlp.Wo",
            },
        ),
        {
            "embed": "embeddings.tok_embeddings",
            "embed_norm": "embeddings.norm",
            "norm": "final_norm",
            # The first layer has no norm before its attention.
            "layer.0.norm.0": "layers.0.mlp_norm",
            "layer.1.norm.0": "layers.1.attn_norm",
            "layer.1.norm.1": "layers.1.mlp_norm",
        },
    ),
    "llama": Architecture(
        DECODER,
        lambda: tf.LlamaConfig(**GROUPED),
        _layer("model.layers.{i}", LLAMA_LAYER),
        LLAMA_AROUND,
        (4, 2, 8),
    ),
    "mistral": Architecture(
        DECODER,
        lambda: tf.MistralConfig(**GROUPED),
        _layer("model.layers.{i}", LLAMA_LAYER),
        LLAMA_AROUND,
        (4, 2, 8),
    ),
    "qwen2": Architecture(
        DECODER,
        lambda: tf.Qwen2Config(**GROUPED),
        _layer("model.layers.{i}", LLAMA_LAYER),
        LLAMA_AROUND,
        (4, 2, 8),
    ),
    # Heads wider than hidden_size / heads, and norms on queries and keys.
    "qwen3": Architecture(
        DECODER,
        lambda: tf.Qwen3Config(**GROUPED, head_dim=16),
        _layer("model.layers.{i}", LLAMA_LAYER),
        LLAMA_AROUND,
        (4, 2, 16),
    ),
    # Soft caps on scores and logits; four norms.
    "gemma2": Architecture(
        DECODER,
        lambda: tf.Gemma2Config(**GROUPED, head_dim=16),
        _layer(
            "model.layers.{i}",
            LLAMA_LAYER
            | {"norm.2": "pre_feedforward_layernorm", "norm.3": "post_feedforward_layernorm"},
        ),
        LLAMA_AROUND,
        (4, 2, 16),
        kv=False,
    ),
    "phi3": Architecture(
        DECODER,
        lambda: tf.Phi3Config(**GROUPED),
        _layer(
            "model.layers.{i}",
            {
                "attn": "self_attn",
                **_fused("self_attn.qkv_proj", k=((32, 48),), v=((48, 64),)),
                "attn.o": "self_attn.o_proj",
                "ffn.gate": ("mlp.gate_up_proj", ((0, 48),)),
                "ffn.up": ("mlp.gate_up_proj", ((48, 96),)),
                "ffn.gate_up": "mlp.gate_up_proj",
                "ffn.down": "mlp.down_proj",
                "norm.0": "input_layernorm",
                "norm.1": "post_attention_layernorm",
            },
        ),
        LLAMA_AROUND,
        (4, 2, 8),
    ),
    "gpt2": Architecture(
        DECODER,
        lambda: tf.GPT2Config(**GPT),
        _layer(
            "transformer.h.{i}",
            {
                "attn": "attn",
                **_fused("attn.c_attn"),
                "attn.o": "attn.c_proj",
                "ffn.up": "mlp.c_fc",
                "ffn.down": "mlp.c_proj",
                "norm.0": "ln_1",
                "norm.1": "ln_2",
            },
        ),
        {"embed": "transformer.wte", "norm": "transformer.ln_f", "head": "lm_head"},
    ),
    "gpt-bigcode": Architecture(
        DECODER,
        lambda: tf.GPTBigCodeConfig(**GPT),
        _layer(
            "transformer.h.{i}",
            {
                "attn": "attn",
                **_fused("attn.c_attn", k=((32, 40),), v=((40, 48),)),
                "attn.o": "attn.c_proj",
                "ffn.up": "mlp.c_fc",
                "ffn.down": "mlp.c_proj",
                "norm.0": "ln_1",
                "norm.1": "ln_2",
            },
        ),
        {"embed": "transformer.wte", "norm": "transformer.ln_f", "head": "lm_head"},
        (4, 1, 8),
    ),
    "gpt-neox": Architecture(
        DECODER,
        lambda: tf.GPTNeoXConfig(**SMALL, bos_token_id=1, eos_token_id=2),
        _layer(
            "gpt_neox.layers.{i}",
            {
                "attn": "attention",
                **_fused("attention.query_key_value", **INTERLEAVED),
                "attn.o": "attention.dense",
                "ffn.up": "mlp.dense_h_to_4h",
                "ffn.down": "mlp.dense_4h_to_h",
                "norm.0": "input_layernorm",
                "norm.1": "post_attention_layernorm",
            },
        ),
        {"embed": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "lm_head"},
    ),
    "opt": Architecture(
        DECODER,
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
        _layer(
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
        DECODER,
        lambda: tf.FalconConfig(**FALCON),
        _layer(
            "transformer.h.{i}",
            _bloom_layer(k=((32, 40),), v=((40, 48),)) | {"norm.0": "input_layernorm"},
        ),
        BLOOM_AROUND,
        (4, 1, 8),
        kv=False,
    ),
    # Groups of two queries, one key, one value.
    "falcon-grouped": Architecture(
        DECODER,
        lambda: tf.FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True),
        _layer(
            "transformer.h.{i}",
            _bloom_layer(q=((0, 16), (32, 48)), k=((16, 24), (48, 56)), v=((24, 32), (56, 64)))
            | {"norm.0": "ln_attn", "norm.1": "ln_mlp"},
        ),
        BLOOM_AROUND,
        (4, 2, 8),
        kv=False,
    ),
    "bloom": Architecture(
        DECODER,
        lambda: tf.BloomConfig(
            hidden_size=32, n_layer=2, n_head=4, vocab_size=64, pad_token_id=0, eos_token_id=2
        ),
        _layer(
            "transformer.h.{i}",
            _bloom_layer(**INTERLEAVED)
            | {"norm.0": "input_layernorm", "norm.1": "post_attention_layernorm"},
        ),
        BLOOM_AROUND | {"embed_norm": "transformer.word_embeddings_layernorm"},
        kv=False,
    ),
    "t5": Architecture(BOTH, lambda: tf.T5Config(**T5), *_t5(gated=False)),
    "t5-v1.1": Architecture(
        BOTH,
        lambda: tf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        *_t5(gated=True),
    ),
    "bart": Architecture(
        BOTH,
        lambda: tf.BartConfig(
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            vocab_size=64,
            max_position_embeddings=64,
            forced_eos_token_id=2,
        ),
        _bart(),
        {
            "encoder.embed": "model.encoder.embed_tokens",
            "decoder.embed": "model.decoder.embed_tokens",
            "encoder.embed_norm": "model.encoder.layernorm_embedding",
            "decoder.embed_norm": "model.decoder.layernorm_embedding",
            "head": "lm_head",
        },
    ),
    # The experts' weights are three-dimensional: the mixture as a whole has a site.
    "mixtral": Architecture(
        DECODER,
        lambda: tf.MixtralConfig(**GROUPED, num_local_experts=4),
        _layer(
            "model.layers.{i}",
            LLAMA_ATTENTION
            | {
                "ffn.experts": "mlp.experts",
                "norm.0": "input_layernorm",
                "norm.1": "post_attention_layernorm",
            },
        ),
        LLAMA_AROUND,
        (4, 2, 8),
    ),
}
