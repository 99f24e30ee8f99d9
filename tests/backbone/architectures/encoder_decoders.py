"""Encoders with a decoder."""

from __future__ import annotations

import transformers as tf

from architectures.truth import Architecture, Place, in_layers

T5 = {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 48, "vocab_size": 64}


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
    layer = in_layers("encoder.block.{i}", encoder, "encoder.")
    layer |= in_layers("decoder.block.{i}", decoder, "decoder.")
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
    layer = in_layers("model.encoder.layers.{i}", encoder, "encoder.")
    return layer | in_layers("model.decoder.layers.{i}", decoder, "decoder.")


ENCODER_DECODERS: dict[str, Architecture] = {
    "t5": Architecture(tf.AutoModelForSeq2SeqLM, lambda: tf.T5Config(**T5), *_t5(gated=False)),
    "t5-v1.1": Architecture(
        tf.AutoModelForSeq2SeqLM,
        lambda: tf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        *_t5(gated=True),
    ),
    "bart": Architecture(
        tf.AutoModelForSeq2SeqLM,
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
}
