"""Encoders."""

from __future__ import annotations

import transformers as tf

from architectures.truth import SMALL, Architecture, Place, fused, in_layers

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

ENCODERS: dict[str, Architecture] = {
    "bert": Architecture(
        tf.AutoModel,
        lambda: tf.BertConfig(**SMALL),
        in_layers("encoder.layer.{i}", BERT_LAYER),
        BERT_AROUND,
    ),
    "roberta": Architecture(
        tf.AutoModel,
        lambda: tf.RobertaConfig(**SMALL),
        in_layers("encoder.layer.{i}", BERT_LAYER),
        BERT_AROUND,
    ),
    "distilbert": Architecture(
        tf.AutoModel,
        lambda: tf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=64),
        in_layers(
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
        tf.AutoModel,
        lambda: tf.AlbertConfig(**SMALL, embedding_size=16),
        in_layers(
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
        tf.AutoModel,
        lambda: tf.ElectraConfig(**SMALL, embedding_size=16),
        in_layers("encoder.layer.{i}", BERT_LAYER),
        {"embed": "embeddings.word_embeddings"},
    ),
    "deberta-v2": Architecture(
        tf.AutoModel,
        lambda: tf.DebertaV2Config(
            **SMALL,
            relative_attention=True,
            position_buckets=8,
            pos_att_type="p2c|c2p",
            share_att_key=True,
            norm_rel_ebd="layer_norm",
        ),
        in_layers(
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
        tf.AutoModel,
        lambda: tf.ModernBertConfig(
            **SMALL, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2
        ),
        in_layers(
            "layers.{i}",
            {
                "attn": "attn",
                **fused("attn.Wqkv"),
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
}
