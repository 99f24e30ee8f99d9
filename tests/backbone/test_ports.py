"""The embedding and attention ports: a plugged prompt or prefix is the text that it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from cfm_train.backbone.masks import texts_apart, with_virtual
from cfm_train.backbone.plugs import KV, Prompt
from cfm_train.backbone.virtual import lay_out
from cfm_train.errors import UserError
from tests.backbones import FAMILIES, answers, bare, batch, plain_model, tiny
from tests.port_cases import (
    CLOSE,
    DECODERS,
    Plugs,
    prompt_of,
    random_prefix,
    recorded_prefix,
    run,
    tokens,
)


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


@pytest.mark.parametrize("family", DECODERS)
def test_keys_at_shared_positions_leave_each_other_where_they_are(family: str) -> None:
    """The text lies behind the longest of them, as a cache with those keys and positions has it."""
    backbone = tiny(family)
    inputs = batch(backbone)
    short, long = (random_prefix(backbone, n, seed=n, shared=True) for n in (2, 5))
    for one, seed in ((short, 2), (long, 5)):
        behind = random_prefix(backbone, seed, seed=seed)
        assert torch.equal(run(backbone, inputs, one), run(backbone, inputs, behind))
    ids = inputs["input_ids"]
    cache = DynamicCache(config=backbone.model.config)
    for layer, (one, other) in enumerate(zip(short.plugs(), long.plugs(), strict=True)):
        keys, values = (
            torch.cat([getattr(one, what), getattr(other, what)])
            .transpose(0, 1)
            .expand(len(ids), -1, -1, -1)
            for what in ("keys", "values")
        )
        cache.update(keys, values, layer)
    ahead = torch.ones(len(ids), 7, dtype=torch.int64)
    typed = {
        "input_ids": ids,
        "attention_mask": torch.cat([ahead, inputs["attention_mask"]], dim=1),
        "position_ids": (torch.arange(ids.shape[1]) + 5).expand_as(ids),
        "past_key_values": cache,
    }
    with torch.inference_mode():
        expected = plain_model(family)(**typed).logits
    real = inputs["attention_mask"].bool()
    found = run(backbone, inputs, short, long)
    torch.testing.assert_close(found[real], expected[real], **CLOSE)
    turned = run(backbone, inputs, long, short)
    torch.testing.assert_close(turned[real], found[real], **CLOSE)
    behind = run(backbone, inputs, *(random_prefix(backbone, n, seed=n) for n in (2, 5)))
    assert (behind - found)[real].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_shared_positions_row_by_row_and_behind_others(family: str) -> None:
    backbone = tiny(family)
    inputs = batch(backbone, rows=4)
    bricks = [
        random_prefix(backbone, 2, seed=2, shared=True),
        random_prefix(backbone, 3, seed=3),
        random_prefix(backbone, 5, seed=5, shared=True),
    ]
    table = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]]).float()
    mixed = run(backbone, inputs, *bricks, weights=list(table))
    for row in range(4):
        own = [brick for brick, weights in zip(bricks, table, strict=True) if weights[row]]
        alone = run(backbone, {k: v[row : row + 1] for k, v in inputs.items()}, *own)[0]
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(mixed[row][real], alone[real], atol=1e-5, rtol=1e-5)
    stack = backbone.slots._prompt.stacks[""]
    with backbone.slots.plugged(bricks, list(table)):
        assert stack._moves(4).tolist() == [5, 3 + 5, 3 + 5, 0]
    assert stack._moves(4).tolist() == [0, 0, 0, 0]


def test_shared_positions_where_attention_goes_by_distance() -> None:
    """Each row is its solo run, the order is nothing, and each key is as far as it is alone."""
    backbone = tiny("t5")
    inputs = batch(backbone, rows=3)
    short, long = (random_prefix(backbone, n, seed=n, shared=True) for n in (2, 5))
    for one, seed in ((short, 2), (long, 5)):
        behind = random_prefix(backbone, seed, seed=seed)
        assert torch.equal(run(backbone, inputs, one), run(backbone, inputs, behind))
    both, turned = run(backbone, inputs, short, long), run(backbone, inputs, long, short)
    torch.testing.assert_close(both, turned, **CLOSE)
    behind = run(backbone, inputs, *(random_prefix(backbone, n, seed=n) for n in (2, 5)))
    assert (behind - both).abs().max() > 1e-4
    table = torch.tensor([[1, 1, 0], [0, 1, 0]]).float()
    mixed = run(backbone, inputs, short, long, weights=list(table))
    for row, own in enumerate(([short], [short, long], [])):
        alone = run(backbone, {k: v[row : row + 1] for k, v in inputs.items()}, *own)[0]
        torch.testing.assert_close(mixed[row], alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"how far apart tokens are.*same brick\.positions"):
        run(backbone, inputs, short, random_prefix(backbone, 2, seed=2))
    assert torch.equal(run(backbone, inputs), bare(backbone, inputs))


def test_keys_that_move_nothing_share_no_positions() -> None:
    with pytest.raises(ValueError, match="share no positions"):
        KV("layer.0.attn", torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), shift=False, shared=True)


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


def test_virtual_tokens_lie_right_before_the_tokens_of_their_row() -> None:
    rows = [torch.tensor([1, 0, 1, 0]), torch.tensor([0, 1, 1, 0])]
    layout = lay_out([(2, rows[0].bool()), (3, rows[1].bool())], 4)
    assert layout is not None
    assert layout.tolist() == [
        [-1, -1, -1, 0, 1],
        [-1, -1, 2, 3, 4],
        [0, 1, 2, 3, 4],
        [-1, -1, -1, -1, -1],
    ]
    beams = lay_out([(2, rows[0].bool()), (1, None)], 8)
    assert beams is not None
    assert beams.tolist() == [[0, 1, 2], [0, 1, 2], [-1, -1, 2], [-1, -1, 2]] * 2
    assert lay_out([(2, None), (3, None)], 4) is None


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_of_ones_own_grows_by_virtual_keys_and_queries(causal: bool, additive: bool) -> None:
    """Two virtual tokens, of which the second row has one, before three real ones."""
    seen = torch.tensor([[True, True], [False, True]])
    own = torch.ones(3, 3).tril().bool() if causal else torch.tensor([[1, 1, 0]] * 3).bool()
    mask = own.expand(2, 1, 3, 3)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    grown = with_virtual(mask, seen, inserted=True, real=3, causal=causal)
    assert grown is not None
    visible = (grown >= 0) if additive else grown
    top = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]] if causal else [[1, 1, 1, 1, 0]] * 2
    expected = torch.tensor([*top, *([1, 1, *row] for row in own.int().tolist())]).bool()
    assert torch.equal(visible[0, 0], expected)
    expected[:, 0] = False
    assert torch.equal(visible[1, 0], expected)
    cached = with_virtual(mask, seen, inserted=False, real=3, causal=causal)
    assert cached is not None and torch.equal(cached, grown[:, :, 2:])


def test_several_texts_in_a_row_are_told_by_their_positions() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    mask = texts_apart(positions)
    assert mask is not None
    two = torch.block_diag(torch.ones(3, 3).tril(), torch.ones(2, 2).tril()).bool()
    assert torch.equal(mask[0, 0], two)
    assert torch.equal(mask[1, 0], torch.ones(5, 5).tril().bool())
    assert texts_apart(positions[1:]) is None
