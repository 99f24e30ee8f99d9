"""The ports on other architectures: other tables of positions, windows, kinds of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from cfm_train.backbone.attention import NAME
from cfm_train.backbone.plugs import KV, Prompt
from cfm_train.backbone.sites import find_sites
from cfm_train.backbone.slots import Slots
from cfm_train.errors import UserError
from tests.backbones import VOCABULARY
from tests.port_cases import CLOSE, Plugs, tokens


def _slots(model: Any) -> Slots:
    model.requires_grad_(False).eval()
    sites = find_sites(model)
    model.set_attn_implementation(NAME)
    return Slots(model, sites)


def test_a_table_of_positions_that_counts_padding_keeps_its_count() -> None:
    """RoBERTa numbers real tokens from its padding token's number on."""
    model = tf.RobertaModel(
        tf.RobertaConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=40, pad_token_id=1,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    slots = _slots(model)
    text, ids = tokens(1, 3, seed=1), tokens(2, 6, seed=2)
    ids[1, 4:] = 1
    typed = torch.cat([text.expand(2, -1), ids], 1)
    with torch.inference_mode():
        expected = model(typed, typed.ne(1).long()).last_hidden_state[:, 3:]
        plain = model(ids, ids.ne(1).long()).last_hidden_state
        prompt = Plugs(Prompt("embed", model.get_input_embeddings()(text)[0]))
        with slots.plugged([prompt], [torch.tensor([1.0, 0.0])]):
            found = model(ids, ids.ne(1).long()).last_hidden_state
    torch.testing.assert_close(found[0], expected[0], **CLOSE)
    torch.testing.assert_close(found[1, :4], plain[1, :4], **CLOSE)


def test_layers_that_number_their_tokens_themselves_refuse_what_they_cannot_do() -> None:
    model = tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
            decoder_ffn_dim=24, max_position_embeddings=40, pad_token_id=0, bos_token_id=1,
            eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=None,
        )
    )  # fmt: skip
    slots = _slots(model)
    text, ids, decoder = tokens(1, 3, seed=1), tokens(2, 6, seed=2), tokens(2, 4, seed=3)
    table = model.get_submodule(slots.sites["encoder.embed"].module)
    prompt = Plugs(Prompt("encoder.embed", table(text)[0]))
    typed = torch.cat([text.expand(2, -1), ids], 1)
    with torch.inference_mode():
        expected = model(input_ids=typed, decoder_input_ids=decoder).logits
        with slots.plugged([prompt]):
            found = model(input_ids=ids, decoder_input_ids=decoder)
        torch.testing.assert_close(found.logits, expected, **CLOSE)
        assert found.encoder_last_hidden_state.shape[1] == 6
        with (
            slots.plugged([prompt], [torch.tensor([1.0, 0.0])]),
            pytest.raises(UserError, match="plug the prompt in for all rows"),
        ):
            model(input_ids=ids, decoder_input_ids=decoder)
    keys = torch.zeros(2, 2, 8)
    with pytest.raises(UserError, match="choose lora or soft_prompt"):
        slots.plug([Plugs(KV("decoder.layer.0.attn", keys, keys))])


LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4}
BY_NAME: dict[str, Any] = {
    "mistral with a window": (tf.MistralForCausalLM, tf.MistralConfig, {"sliding_window": 5}),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config, {}),
    "gemma3": (
        tf.Gemma3ForCausalLM,
        tf.Gemma3TextConfig,
        {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "neox": (
        tf.GPTNeoXForCausalLM,
        tf.GPTNeoXConfig,
        {**SMALL, "num_hidden_layers": 2, "intermediate_size": 48},
    ),
    "opt": (
        tf.OPTForCausalLM,
        tf.OPTConfig,
        {**SMALL, "num_hidden_layers": 2, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "modernbert": (
        tf.ModernBertModel,
        tf.ModernBertConfig,
        {**SMALL, "num_hidden_layers": 2, "intermediate_size": 48, "pad_token_id": 0},
    ),
}


@pytest.mark.parametrize("name", BY_NAME)
def test_prompt_and_prefix_equal_typed_text(name: str) -> None:
    """One row carries them, the other does not and is padded on the left."""
    model_class, config_class, changed = BY_NAME[name]
    given = changed if "hidden_size" in changed else LLAMA_LIKE | changed
    torch.manual_seed(0)
    model = model_class(config_class(**given))
    for value in model.parameters():
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=0.15)
    slots = _slots(model)
    text, ids = tokens(1, 3, seed=1), tokens(2, 8, seed=2)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    ids = ids * mask
    typed = torch.cat([text, ids[:1]], dim=1)
    attention = [site.name for site in slots.sites.values() if site.kind == "attention"]

    def states(**inputs: Tensor) -> Tensor:
        output = model(**inputs)
        return output.last_hidden_state if "logits" not in output else output.logits

    with torch.inference_mode():
        with slots.recording(attention) as noted:
            expected = states(input_ids=typed)[0, 3:]
        alone = states(input_ids=ids[1:], attention_mask=mask[1:])[0, 2:]
        bricks = [Plugs(Prompt("embed", model.get_input_embeddings()(text)[0]))]
        if "sliding_window" not in changed:  # a prefix stays in sight, typed text does not
            parts = {n: (k[0, :, :3], v[0, :, :3]) for n, (k, v) in noted.items()}
            bricks.append(
                Plugs(*(KV(n, k.transpose(0, 1), v.transpose(0, 1)) for n, (k, v) in parts.items()))
            )
        for brick in bricks:
            with slots.plugged([brick], [torch.tensor([1.0, 0.0])]):
                found = states(input_ids=ids, attention_mask=mask)
            torch.testing.assert_close(found[0], expected, **CLOSE)
            torch.testing.assert_close(found[1, 2:], alone, **CLOSE)
        if name != "modernbert":
            options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
            wanted = model.generate(typed, **options)[0, 11:]
            for cache in ("dynamic", "static"):
                with slots.plugged(bricks[:1], [torch.tensor([1.0, 0.0])]):
                    written = model.generate(
                        input_ids=ids, attention_mask=mask, cache_implementation=cache, **options
                    )
                assert torch.equal(written[0, 8:], wanted), cache
