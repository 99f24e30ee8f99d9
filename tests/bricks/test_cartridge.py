"""Cartridges and documents: the laws of every kind, PEFT as the oracle, real text as the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.cartridge import Cartridge
from cfm_train.bricks.document import Document
from cfm_train.bricks.peft_modules import TASK_TYPES
from cfm_train.bricks.prefix import room
from cfm_train.errors import UserError
from tests import brick_laws as laws
from tests.backbones import FAMILIES, answers, bare, batch, tiny
from tests.peft_peers import files_of, in_peft, trained_by_peft, values

HYPER: dict[str, Any] = {
    "tokens": 4,
    "init": "document",
    "text": None,
    "frozen": 1,
    "sites": ["attn"],
    "layers": None,
    "positions": "behind",
}
TEXT = torch.tensor([7, 9, 11, 13, 8])


def cartridge(backbone: Backbone, **changed: Any) -> Cartridge:
    """A new brick as ``conf/brick/cartridge.yaml`` has it, but short, unless told otherwise."""
    return Cartridge(**HYPER | changed).about(TEXT).build(backbone)


def document(backbone: Backbone, tokens: int | None = None) -> Document:
    return Document(tokens, ["attn"], None, "behind").about(TEXT).build(backbone)


def sharing(backbone: Backbone) -> Cartridge:
    return cartridge(backbone, positions="shared")


def somewhere(backbone: Backbone) -> Cartridge:
    cross = ["cross"] if backbone.family == "encoder-decoder" else []
    return cartridge(backbone, sites=["attn", *cross], layers=[-1], tokens=3, frozen=2)


@pytest.mark.parametrize("make", [cartridge, document, somewhere], ids=lambda make: make.__name__)
@pytest.mark.parametrize("family", FAMILIES)
class TestLaws:
    def test_unplugs_exactly(self, family: str, make: Any) -> None:
        laws.unplugs_exactly(make, family)

    def test_rows_are_their_own(self, family: str, make: Any) -> None:
        laws.rows_are_their_own(make, family, untouched=1e-5)

    def test_only_the_brick_learns(self, family: str, make: Any) -> None:
        laws.only_the_brick_learns(make, family)

    def test_round_trips(self, family: str, make: Any) -> None:
        laws.round_trips(make, family)

    def test_recomputes_the_same(self, family: str, make: Any) -> None:
        laws.recomputes_the_same(make, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_positions_keep_the_laws(family: str) -> None:
    laws.unplugs_exactly(sharing, family)
    laws.rows_are_their_own(sharing, family, untouched=1e-5)
    laws.round_trips(sharing, family)
    if family != "bert":
        laws.generates_with_a_cache(sharing, family)


def test_a_brick_of_before_shared_positions_opens_as_it_was() -> None:
    backbone = tiny("llama")
    made = sharing(backbone)
    old = made.interface()["hyper"] | {}
    del old["positions"]
    read = Cartridge.restore({**made.interface(), "hyper": old}, made.files(), backbone)
    assert read.hyper["positions"] == "behind"
    again = Cartridge.restore(made.interface(), made.files(), backbone)
    assert again.hyper["positions"] == "shared"
    assert room([made, again, read]) == 8


@pytest.mark.parametrize("make", [cartridge, document], ids=lambda make: make.__name__)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generates_with_a_cache(family: str, make: Any) -> None:
    laws.generates_with_a_cache(make, family)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("make", [cartridge, document], ids=lambda make: make.__name__)
def test_a_new_one_is_the_text_in_the_context(family: str, make: Any) -> None:
    backbone = tiny(family)
    brick = make(backbone)
    count = len(brick.states(brick.site_names[0])[0])
    ids = batch(backbone)["input_ids"]
    typed = torch.cat([TEXT[:count].expand(len(ids), -1), ids], dim=1)
    expected = bare(backbone, {"input_ids": typed})[:, count:]
    found = laws.plugged(backbone, [brick], {"input_ids": ids})
    assert (expected - bare(backbone, {"input_ids": ids})).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_first_token_stays_and_the_others_learn() -> None:
    """Also with weight decay, which moves what has no gradient."""
    backbone = tiny("llama")
    brick = cartridge(backbone).train()
    start = {name: value.clone() for name, value in brick.tensors().items()}
    optimizer = torch.optim.AdamW(brick.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        with backbone.slots.plugged([brick]):
            answers(backbone, batch(backbone)).square().mean().backward()
        optimizer.step()
    for name, value in brick.tensors().items():
        assert torch.equal(value[:1], start[name][:1])
        assert (value[1:] - start[name][1:]).abs().min() > 1e-4
    assert sum(p.numel() for p in brick.parameters()) == sum(v[1:].numel() for v in start.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_peft_in_both_directions(family: str, tmp_path: Path) -> None:
    backbone = tiny(family)
    inputs = batch(backbone)
    config = peft.CartridgeConfig(
        task_type=TASK_TYPES[backbone.family], num_virtual_tokens=5, num_frozen_tokens=2
    )
    theirs = trained_by_peft(family, config)
    files = files_of(theirs, tmp_path / "theirs")
    read = Cartridge.restore({"kind": "cartridge"}, files, backbone)
    assert read.hyper["frozen"] == 2
    real = ... if family == "t5" else inputs["attention_mask"].bool()
    expected, found = values(theirs, inputs), laws.plugged(backbone, [read], inputs)
    assert (found - bare(backbone, inputs)).abs().max() > 1e-3
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=0)

    ours = read if family == "t5" else laws.random_brick(cartridge, backbone, scale=0.3)
    there = in_peft(ours, family, tmp_path / "ours")
    assert there.peft_config["default"].num_frozen_tokens == ours.hyper["frozen"]
    found = laws.plugged(backbone, [ours], inputs)
    torch.testing.assert_close(values(there, inputs)[real], found[real], atol=1e-5, rtol=0)


def test_what_does_not_fit_is_refused_with_a_sentence() -> None:
    llama = tiny("llama")
    with pytest.raises(UserError, match="leaves nothing to train"):
        cartridge(llama, frozen=4)
    with pytest.raises(UserError, match=r"more than the 5 tokens .* brick\.tokens=5"):
        cartridge(llama, tokens=6)
    with pytest.raises(UserError, match="starts from a document, and there is none"):
        Cartridge(**HYPER).build(llama)
    with pytest.raises(UserError, match=r"reads 128 at most: set brick\.tokens below 128"):
        Document(None, ["attn"], None, "behind").about(TEXT.repeat(40)).build(llama)
