"""The embedding and attention ports: a plugged prompt or prefix is the typed text that it stands for.

The oracle is the model itself. A prompt made of the embeddings of real tokens, or a prefix made of
the keys and values that real tokens leave behind, must give what typing those tokens gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers as tf
from tests.backbones import FAMILIES, VOCABULARY, answers, bare, batch, plain_model, tiny
from torch import Tensor

from cfm_train.backbone.attention import NAME
from cfm_train.backbone.load import Backbone
from cfm_train.backbone.sites import find_sites
from cfm_train.backbone.slots import KV, Plug, Prompt, Slots
from cfm_train.errors import UserError

DECODERS = ("llama", "gpt2")
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


class Plugs:
    """The least that a slot needs of a brick."""

    def __init__(self, *plugs: Plug) -> None:
        self._plugs = plugs

    def plugs(self) -> Iterable[Plug]:
        return self._plugs


def tokens(rows: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def embed_site(backbone: Backbone) -> str:
    return "encoder.embed" if backbone.family == "encoder-decoder" else "embed"


def prompt_of(backbone: Backbone, text: Tensor) -> Plugs:
    """A prompt that stands for ``text``, token ids ``[tokens]``."""
    site = embed_site(backbone)
    table = backbone.model.get_submodule(backbone.sites[site].module)
    return Plugs(Prompt(site, table(text[None])[0]))


def random_prefix(backbone: Backbone, length: int, seed: int, sites: str = "attn") -> Plugs:
    generator = torch.Generator().manual_seed(seed)
    return Plugs(
        *(
            KV(
                site.name,
                torch.randn(length, site.kv_heads, site.head_dim, generator=generator),
                torch.randn(length, site.kv_heads, site.head_dim, generator=generator),
            )
            for site in backbone.sites.select([sites])
        )
    )


def recorded_prefix(backbone: Backbone, inputs: dict[str, Tensor], cut: dict[str, int]) -> Plugs:
    """The keys and values of the first tokens of each stack (``cut``: how many), from a whole pass."""
    names = [s.name for s in backbone.sites.values() if s.kind == "attention"]
    with backbone.slots.recording(names) as noted, torch.inference_mode():
        answers(backbone, inputs)
    plugs = []
    for name, (keys, values) in noted.items():
        stack = "encoder." if name.endswith(".cross") else backbone.sites[name].stack
        front = slice(0, cut[stack])
        if cut[stack]:
            parts = [part[0, :, front].transpose(0, 1).clone() for part in (keys, values)]
            plugs.append(KV(name, parts[0], parts[1]))
    return Plugs(*plugs)


def run(
    backbone: Backbone, inputs: dict[str, Tensor], *bricks: Plugs, weights: Any = None
) -> Tensor:
    with backbone.slots.plugged(bricks, weights), torch.inference_mode():
        return answers(backbone, inputs)


# -- nothing plugged ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_slots_are_transformers_own_model_to_the_bit(family: str) -> None:
    backbone, plain = tiny(family), plain_model(family)
    assert plain.config._attn_implementation == "sdpa"
    inputs = batch(backbone)
    with torch.inference_mode():
        assert torch.equal(bare(backbone, inputs), answers(plain, inputs))
    if family != "bert":
        options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
        given = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        ours, theirs = (m.generate(**given, **options) for m in (backbone.model, plain))
        assert torch.equal(ours, theirs)


# -- a prompt is typed text --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_equals_the_text_that_it_stands_for(family: str) -> None:
    backbone = tiny(family)
    inputs = batch(backbone)
    text = tokens(1, 4, seed=5)
    front = text.expand(len(inputs["input_ids"]), -1)
    typed = inputs | {
        "input_ids": torch.cat([front, inputs["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(front), inputs["attention_mask"]], 1),
    }
    expected = bare(backbone, typed)
    expected = expected if family == "t5" else expected[:, 4:]
    found = run(backbone, inputs, prompt_of(backbone, text[0]))
    torch.testing.assert_close(found, expected, **CLOSE)
    with backbone.slots.plugged([prompt_of(backbone, text[0])]), torch.inference_mode():
        hidden = backbone.hidden_states(inputs["input_ids"], inputs["attention_mask"])
        every = backbone.model(**inputs, output_hidden_states=True)
    assert hidden.shape[:2] == inputs["input_ids"].shape
    kept = every.encoder_hidden_states if family == "t5" else every.hidden_states
    assert {h.shape[1] for h in kept} == {inputs["input_ids"].shape[1]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_equals_the_text_whose_keys_and_values_it_holds(family: str) -> None:
    backbone = tiny(family)
    whole = {"input_ids": tokens(1, 11, seed=2)}
    cut = {"": 4, "encoder.": 4, "decoder.": 3}
    rest = {"input_ids": whole["input_ids"][:, 4:]}
    if family == "t5":
        whole["decoder_input_ids"] = tokens(1, 8, seed=3)
        rest["decoder_input_ids"] = whole["decoder_input_ids"][:, 3:]
    expected = bare(backbone, whole)[:, 3 if family == "t5" else 4 :]
    prefix = recorded_prefix(backbone, whole, cut)
    for masked in (False, True):
        mask = {"attention_mask": torch.ones_like(rest["input_ids"])} if masked else {}
        torch.testing.assert_close(run(backbone, rest | mask, prefix), expected, **CLOSE)


# -- another brick for every row ---------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_mixed_batch_equal_their_solo_runs(family: str, left: bool) -> None:
    """Two prompts and two prefixes of different lengths over five rows, in one pass."""
    backbone = tiny(family)
    inputs = batch(backbone, rows=5)
    if left:
        inputs = inputs | {k: inputs[k].flip(1) for k in ("input_ids", "attention_mask")}
    bricks = [
        prompt_of(backbone, tokens(1, 3, seed=1)[0]),
        random_prefix(backbone, 2, seed=2),
        prompt_of(backbone, tokens(1, 5, seed=3)[0]),
        random_prefix(backbone, 4, seed=4),
    ]
    table = torch.tensor(
        [[1, 1, 0, 0, 1], [0, 1, 0, 1, 1], [0, 0, 0, 1, 1], [1, 0, 0, 0, 1]]
    ).float()
    mixed = run(backbone, inputs, *bricks, weights=list(table))
    for row in range(5):
        own = [brick for brick, weights in zip(bricks, table, strict=True) if weights[row]]
        alone = run(backbone, {k: v[row : row + 1] for k, v in inputs.items()}, *own)[0]
        real = slice(None) if family == "t5" else inputs["attention_mask"][row].bool()
        torch.testing.assert_close(mixed[row][real], alone[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_counts_keys_and_values_as_often_as_it_says(family: str) -> None:
    """Weight 3 is the prefix three times over, a weight near 0 is none; token by token too."""
    backbone = tiny(family)
    inputs = batch(backbone)
    single = random_prefix(backbone, 2, seed=2)
    still = Plugs(*(KV(p.site, p.keys, p.values, shift=False) for p in single.plugs()))  # type: ignore[union-attr]
    if family != "t5":  # its bias tells the copies apart
        thrice = Plugs(
            *(
                KV(p.site, p.keys.repeat(3, 1, 1), p.values.repeat(3, 1, 1), shift=False)  # type: ignore[union-attr]
                for p in single.plugs()
            )
        )
        expected = run(backbone, inputs, thrice)
        torch.testing.assert_close(run(backbone, inputs, still, weights=[3.0]), expected, **CLOSE)
    nothing = run(backbone, inputs, still, weights=[1e-30])
    torch.testing.assert_close(nothing, bare(backbone, inputs), **CLOSE)
    if family == "t5":
        return
    rows = torch.tensor([0.0, 1.0, 0.4, 2.0])
    by_row = run(backbone, inputs, still, weights=[rows])
    by_token = run(backbone, inputs, still, weights=[rows[:, None].expand(-1, 9)])
    torch.testing.assert_close(by_token, by_row, **CLOSE)


def test_gradients_reach_row_weights_and_computed_prefixes() -> None:
    backbone = tiny("llama")
    site = backbone.sites.select(["attn"])[0]
    base = torch.randn(3, site.kv_heads, site.head_dim, requires_grad=True)  # type: ignore[attr-defined]
    calls = []

    def keys() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return base * 2

    weight = torch.tensor([0.5, 0.5, 0.5, 0.5], requires_grad=True)
    with backbone.slots.plugged([Plugs(KV(site.name, keys, base))], [weight]):
        for _ in range(2):  # the plan stays: every pass computes the prefix anew
            answers(backbone, batch(backbone)).square().mean().backward()
    assert calls.count(True) == 2
    for value in (base, weight):
        assert value.grad is not None and value.grad.abs().min() > 0


# -- several texts in one row ------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_packed_texts_each_see_the_virtual_tokens_and_not_each_other(family: str) -> None:
    backbone = tiny(family)
    first, second = tokens(1, 5, seed=1), tokens(1, 4, seed=2)
    packed = {
        "input_ids": torch.cat([first, second], 1),
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]),
    }
    for brick in (prompt_of(backbone, tokens(1, 3, 7)[0]), random_prefix(backbone, 3, seed=3)):
        both = run(backbone, packed, brick)
        expected = [run(backbone, {"input_ids": text}, brick) for text in (first, second)]
        torch.testing.assert_close(both, torch.cat(expected, 1), **CLOSE)


# -- generation --------------------------------------------------------------------------------------


def write(backbone: Backbone, given: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The new tokens and their logits ``[steps, rows, vocabulary]``."""
    written = backbone.model.generate(  # type: ignore[operator]
        **given,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return written.sequences[:, -5:], torch.stack(written.logits)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_beams": 3},
    {"use_cache": False},
    {"cache_implementation": "static"},
]


def _name(options: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items()) or "greedy"


@pytest.mark.parametrize("options", OPTIONS, ids=_name)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", DECODERS)
def test_generation_behind_a_prompt_or_prefix_equals_typed_text(
    family: str, padded: bool, options: dict[str, Any]
) -> None:
    """Two rows: one carries the text as a prompt or prefix, the other does not."""
    backbone = tiny(family)
    text, ids = tokens(1, 4, seed=8)[0], tokens(2, 6, seed=9)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :2] = 0
    ids = ids * mask
    given = {"input_ids": ids, "attention_mask": mask}
    typed = {
        "input_ids": torch.stack([torch.cat([text, ids[0]]), torch.cat([text * 0, ids[1]])]),
        "attention_mask": torch.stack(
            [torch.cat([text * 0 + 1, mask[0]]), torch.cat([text * 0, mask[1]])]
        ),
    }
    expected = write(backbone, typed, **options)
    prefix = recorded_prefix(backbone, {"input_ids": typed["input_ids"][:1]}, {"": 4})
    for brick in (prompt_of(backbone, text), prefix):
        with backbone.slots.plugged([brick], [torch.tensor([1.0, 0.0])]):
            found = write(backbone, given, **options)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=_name)
def test_generation_of_an_encoder_decoder_equals_typed_text(options: dict[str, Any]) -> None:
    backbone = tiny("t5")
    text, ids = tokens(1, 4, seed=8)[0], tokens(2, 6, seed=9)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    given = {"input_ids": ids * mask, "attention_mask": mask}
    typed = {
        "input_ids": torch.stack(
            [torch.cat([text, ids[0]]), torch.cat([text * 0, ids[1] * mask[1]])]
        ),
        "attention_mask": torch.stack(
            [torch.cat([text * 0 + 1, mask[0]]), torch.cat([text * 0, mask[1]])]
        ),
    }
    expected = write(backbone, typed, **options)
    weights = [torch.tensor([1.0, 0.0])]
    with backbone.slots.plugged([prompt_of(backbone, text)], weights):
        found = write(backbone, given, **options)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=1e-4)
    with backbone.slots.plugged([random_prefix(backbone, 3, seed=1)], weights):
        found = write(backbone, given, **options)
        slow = write(backbone, given, use_cache=False, num_beams=options.get("num_beams", 1))
    assert torch.equal(found[0], slow[0])
    torch.testing.assert_close(found[1], slow[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_a_cache_from_a_plain_pass_goes_on_where_it_stood(family: str) -> None:
    """A loop of one's own: no mask, no positions, and unplugging in the middle changes nothing."""
    backbone = tiny(family)
    ids = tokens(2, 6, seed=1)
    brick = prompt_of(backbone, tokens(1, 3, seed=2)[0])
    expected = run(backbone, {"input_ids": ids}, brick)
    with torch.inference_mode():
        with backbone.slots.plugged([brick]):
            first = backbone.model(ids[:, :3], use_cache=True)
            second = backbone.model(ids[:, 3:5], past_key_values=first.past_key_values)
        third = backbone.model(ids[:, 5:], past_key_values=second.past_key_values)
    found = torch.cat([first.logits, second.logits, third.logits], 1)
    torch.testing.assert_close(found, expected, **CLOSE)


# -- other architectures -----------------------------------------------------------------------------


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


# -- what is refused ---------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_a_sentence() -> None:
    backbone = tiny("gpt2")
    inputs = batch(backbone)
    prompt = prompt_of(backbone, tokens(1, 3, seed=1)[0])
    keys = torch.zeros(2, 4, 8)
    refused: list[tuple[Plugs, Any, str]] = [
        (prompt, 0.5, "give it one weight for each row, 0 or 1"),
        (prompt, -1.0, "below zero"),
        (Plugs(Prompt("layer.0.attn.q", torch.zeros(2, 32))), None, "takes no prompt"),
        (Plugs(KV("layer.0.attn.q", keys, keys)), None, "is no attention"),
        (Plugs(KV("layer.0.attn", keys[:, :3], keys)), None, r"the site takes \(tokens, 4, "),
    ]
    for brick, weight, sentence in refused:
        with pytest.raises(UserError, match=sentence):
            backbone.slots.plug([brick], [weight])
        assert torch.equal(run(backbone, inputs), bare(backbone, inputs))
    during: list[tuple[Plugs, Any, str]] = [
        (prompt, torch.tensor([1.0, 0.0, 1.0]), "one weight for each row"),
        (Plugs(Prompt("embed", torch.zeros(2, 31))), None, "of another backbone"),
        (Plugs(Prompt("embed", torch.zeros(120, 32))), None, "more than the 128 positions"),
        (random_prefix(backbone, 1, 1), torch.full((4, 5), 0.5), "weights for 5 tokens"),
    ]
    for brick, weight, sentence in during:
        with pytest.raises(UserError, match=sentence):
            run(backbone, inputs, brick, weights=[weight])
    filled = backbone.model(inputs["input_ids"], use_cache=True).past_key_values
    with (
        backbone.slots.plugged([prompt]),
        pytest.raises(UserError, match="start the generation anew"),
    ):
        backbone.model(inputs["input_ids"][:, :1], past_key_values=filled)
