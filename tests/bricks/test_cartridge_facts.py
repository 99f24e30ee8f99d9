"""Cartridges for facts: the laws, a fact's text read in the context, and one fact for each row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cfm_train.backbone.load import Backbone
from cfm_train.backbone.plugs import KV
from cfm_train.bricks.brick import parameter_name
from cfm_train.bricks.cartridge_facts import CartridgeFacts, rotary
from cfm_train.errors import UserError
from tests import brick_laws as laws
from tests.backbones import FAMILIES, bare, batch, randomise, tiny
from tests.fact_cases import FACTS, solo

GIVEN: dict[str, Any] = {"tokens": 3, "frozen": 1, "sites": ["attn"], "layers": None}


def cartridge(backbone: Backbone, **changed: Any) -> CartridgeFacts:
    torch.manual_seed(0)
    return CartridgeFacts(**GIVEN | changed).build(backbone)


def of_facts(backbone: Backbone, facts: list[dict[str, Any]] = FACTS, **changed: Any) -> Any:
    return CartridgeFacts(**GIVEN | changed).for_facts(facts).build(backbone)


def text_of(backbone: Backbone, fact: dict[str, Any]) -> list[int]:
    """The tokens of a fact's text, without an end."""
    ids = backbone.tokenizer(f"{fact['prompt']} {fact['answer']}.")["input_ids"]
    return ids[:-1] if ids[-1] == backbone.tokenizer.eos_token_id else ids


@pytest.mark.parametrize("family", FAMILIES)
class TestLaws:
    def test_unplugs_exactly(self, family: str) -> None:
        laws.unplugs_exactly(cartridge, family)

    def test_rows_are_their_own(self, family: str) -> None:
        laws.rows_are_their_own(cartridge, family, untouched=1e-5)

    def test_only_the_brick_learns(self, family: str) -> None:
        laws.only_the_brick_learns(cartridge, family)

    def test_round_trips(self, family: str) -> None:
        laws.round_trips(cartridge, family)


def test_a_new_one_is_its_text_in_the_context() -> None:
    """Against transformers on text and prompt as one sequence; all facts in one batch."""
    backbone = tiny("llama")
    assert rotary(backbone)
    texts = [text_of(backbone, fact) for fact in FACTS[:2]]  # six tokens and five
    asked = torch.tensor([[7, 8, 9, 10, 11], [12, 13, 14, 15, 16]])
    for at, text in enumerate(texts):
        brick = of_facts(backbone, FACTS[:2], tokens=len(text), frozen=2)
        brick.fire(torch.tensor([at, -1]))
        inputs = {"input_ids": asked, "attention_mask": torch.ones_like(asked)}
        found = laws.plugged(backbone, [brick], inputs)
        with torch.no_grad():
            whole = torch.tensor([[*text, *asked[0].tolist()]])
            expected = backbone.model(input_ids=whole).logits[0, len(text) :]
        assert (expected - bare(backbone, inputs)[0]).abs().max() > 1e-3
        torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)


def test_a_long_text_keeps_its_start_and_its_end_and_a_short_one_is_repeated() -> None:
    """Keys and values against transformers' own cache of the texts."""
    backbone = tiny("gpt2")  # learned positions: read where a prompt lies
    assert not rotary(backbone)
    fact = FACTS[2]
    text = text_of(backbone, fact)
    for tokens in (3, len(text) + 2):
        brick = of_facts(backbone, FACTS, tokens=tokens)
        read = (text * 2)[: max(len(text), tokens)]
        with torch.no_grad():
            cache = backbone.model(input_ids=torch.tensor([read])).past_key_values
        last = range(len(read) - tokens + 1, len(read))
        for layer, name in enumerate(brick.site_names):
            for ours, theirs in zip(
                brick.stacks(name),
                (cache.layers[layer].keys, cache.layers[layer].values),
                strict=True,
            ):
                expected = theirs[0].transpose(0, 1)[[0, *last]]
                torch.testing.assert_close(ours[2], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_fact_for_each_row(family: str) -> None:
    """Also against keys and values plugged in by hand; frozen tokens are no parameters."""
    backbone = tiny(family)
    inputs = batch(backbone, rows=4)
    brick = of_facts(backbone)
    randomise(brick, scale=0.3)
    solo(brick, backbone, inputs)

    class ByHand:
        def plugs(self) -> list[KV]:
            made = []
            for site in brick.site_names:
                keys, values = brick.stacks(site)
                made.append(KV(site, keys[2].detach(), values[2].detach(), shift=False))
            return made

    brick.fire(torch.tensor([2, 2, 2, 2]))
    expected = laws.plugged(backbone, [ByHand()], inputs)  # type: ignore[list-item]
    torch.testing.assert_close(laws.plugged(backbone, [brick], inputs), expected, atol=1e-5, rtol=0)
    brick.fire(torch.tensor([-1, -1, -1, -1]))
    assert torch.equal(laws.plugged(backbone, [brick], inputs), bare(backbone, inputs))
    site = parameter_name(brick.site_names[0])
    first = dict(brick.named_buffers())[f"first_keys_{site}"]
    assert first.shape[:2] == (3, 1) and brick.keys[site].shape[:2] == (3, 2)
    assert not first.requires_grad


def test_something_is_left_to_train() -> None:
    with pytest.raises(UserError, match="leaves nothing to train"):
        CartridgeFacts(**GIVEN | {"frozen": 3})
