"""Prefixes: the laws of every kind, and PEFT as the oracle in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import parameter_name
from cfm_train.bricks.peft_modules import TASK_TYPES
from cfm_train.bricks.prefix import Prefix, token_states
from cfm_train.errors import UserError
from tests import brick_laws as laws
from tests.backbones import FAMILIES, answers, bare, batch, randomise, tiny
from tests.peft_peers import files_of, in_peft, trained_by_peft, values

HYPER: dict[str, Any] = {
    "tokens": 4,
    "init": "vocabulary",
    "text": None,
    "sites": ["attn"],
    "layers": None,
    "projection": None,
    "positions": "behind",
}


def prefix(backbone: Backbone, **changed: Any) -> Prefix:
    """A new brick as ``conf/brick/prefix.yaml`` has it, but short, unless told otherwise."""
    return Prefix(**HYPER | changed).build(backbone)


def projected(backbone: Backbone) -> Prefix:
    return prefix(backbone, projection=6)


def everywhere(backbone: Backbone) -> Prefix:
    cross = ["cross"] if backbone.family == "encoder-decoder" else []
    return prefix(backbone, sites=["attn", *cross], layers=[-1], tokens=2)


@pytest.mark.parametrize("make", [prefix, projected, everywhere], ids=lambda make: make.__name__)
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


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generates_with_a_cache(family: str) -> None:
    laws.generates_with_a_cache(prefix, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_peft_in_both_directions(family: str, tmp_path: Path) -> None:
    """Also where PEFT deals the layers of a decoder out by fours (T5)."""
    backbone = tiny(family)
    inputs = batch(backbone)
    config = peft.PrefixTuningConfig(
        task_type=TASK_TYPES[backbone.family],
        num_virtual_tokens=5,
        prefix_projection=True,
        encoder_hidden_size=7,
    )
    theirs = trained_by_peft(family, config)
    read = Prefix.restore({"kind": "prefix"}, files_of(theirs, tmp_path / "theirs"), backbone)
    real = ... if family == "t5" else inputs["attention_mask"].bool()
    expected, found = values(theirs, inputs), laws.plugged(backbone, [read], inputs)
    assert (found - bare(backbone, inputs)).abs().max() > 1e-3
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=0)

    ours = read if family == "t5" else laws.random_brick(projected, backbone, scale=0.3)
    again = values(in_peft(ours, family, tmp_path / "ours"), inputs)
    found = laws.plugged(backbone, [ours], inputs)
    torch.testing.assert_close(again[real], found[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_gradients_equal_those_of_peft(family: str) -> None:
    backbone = tiny(family)
    inputs = batch(backbone)
    inputs["attention_mask"].fill_(1)
    config = peft.PrefixTuningConfig(
        task_type=TASK_TYPES[backbone.family], num_virtual_tokens=4, prefix_projection=False
    )
    theirs = trained_by_peft(family, config)
    ours = prefix(backbone)
    randomise(ours)
    assert ours.layout is not None
    states = {site: ours.states(site) for site in ours.site_names}
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(ours.layout.flatten(states))
    answers(theirs, inputs).square().sum().backward()
    with backbone.slots.plugged([ours]):
        answers(backbone, inputs).square().sum().backward()
    found = ours.layout.flatten(
        {
            site: (ours.keys[parameter_name(site)].grad, ours.values[parameter_name(site)].grad)
            for site in ours.site_names
        }
    )
    expected = theirs.prompt_encoder["default"].embedding.weight.grad
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_starts_as_what_a_text_leaves_behind(family: str) -> None:
    """A prefix made of a text's states is that text, read before the input (causal models)."""
    backbone = tiny(family)
    brick = prefix(backbone, tokens=3, init="text", text="w7 w9 w11")
    states = token_states(backbone, torch.tensor([7, 9, 11]), list(brick.site_names))
    for site in brick.site_names:
        for a, b in zip(brick.states(site), states[site], strict=True):
            assert torch.equal(a, b)
    if family != "bert":
        ids = batch(backbone)["input_ids"]
        typed = torch.cat([torch.tensor([[7, 9, 11]]).expand(len(ids), -1), ids], dim=1)
        expected = bare(backbone, {"input_ids": typed})[:, 3:]
        found = laws.plugged(backbone, [brick], {"input_ids": ids})
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        same = prefix(backbone, tokens=3, init="text", text="w7 w9 w11", projection=5)
        projected = laws.plugged(backbone, [same], {"input_ids": ids})
        torch.testing.assert_close(projected, expected, atol=2e-5, rtol=0)


def test_random_start_has_the_spread_of_real_tokens() -> None:
    backbone = tiny("gpt2")
    real, noise = (prefix(backbone, tokens=64, init=init) for init in ("vocabulary", "random"))
    for site in real.site_names:
        for a, b in zip(real.states(site), noise.states(site), strict=True):
            assert 0.8 < (b.std() / a.std()).item() < 1.25


def test_what_peft_cannot_say_lies_in_a_file_of_our_own() -> None:
    """Some layers only; both stacks; a prefix for each of an even number of decoder layers."""
    t5, llama = tiny("t5"), tiny("llama")
    for brick in (
        prefix(llama, layers=[0]),
        prefix(t5),
        laws.random_brick(lambda b: prefix(b, sites=["decoder.layer.*.attn"]), t5),
    ):
        assert list(brick.files()) == ["brick.safetensors"]
    assert "adapter_model.safetensors" in prefix(llama).files()


def test_what_does_not_fit_is_refused_with_a_sentence() -> None:
    llama, gpt2 = tiny("llama"), tiny("gpt2")
    with pytest.raises(UserError, match="is a linear, not attention"):
        prefix(llama, sites=["attn.q"])
    with pytest.raises(UserError, match="trained on another model"):
        Prefix.restore({}, prefix(llama).files(), gpt2)
    native = prefix(llama, layers=[0])
    with pytest.raises(UserError, match=r"no fitting keys and values for 'layer\.0\.attn'"):
        Prefix.restore(native.interface(), native.files(), gpt2)
    with pytest.raises(UserError, match="other sites or another model"):
        native.load_tensors({name: value[:1] for name, value in native.tensors().items()})
