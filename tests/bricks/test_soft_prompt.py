"""Soft prompts: the laws of every kind, and PEFT as the oracle in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.peft_modules import TASK_TYPES
from cfm_train.bricks.soft_prompt import SoftPrompt
from cfm_train.errors import UserError
from tests import brick_laws as laws
from tests.backbones import FAMILIES, answers, bare, batch, tiny
from tests.peft_peers import files_of, in_peft, trained_by_peft, values


def soft_prompt(backbone: Backbone, **changed: Any) -> SoftPrompt:
    """A new brick as ``conf/brick/soft_prompt.yaml`` has it, but short, unless told otherwise."""
    return SoftPrompt(**{"tokens": 4, "init": "vocabulary", "text": None} | changed).build(backbone)


@pytest.mark.parametrize("family", FAMILIES)
class TestLaws:
    def test_unplugs_exactly(self, family: str) -> None:
        laws.unplugs_exactly(soft_prompt, family)

    def test_rows_are_their_own(self, family: str) -> None:
        laws.rows_are_their_own(soft_prompt, family, untouched=1e-5)

    def test_only_the_brick_learns(self, family: str) -> None:
        laws.only_the_brick_learns(soft_prompt, family)

    def test_round_trips(self, family: str) -> None:
        laws.round_trips(soft_prompt, family)

    def test_recomputes_the_same(self, family: str) -> None:
        laws.recomputes_the_same(soft_prompt, family)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generates_with_a_cache(family: str) -> None:
    laws.generates_with_a_cache(soft_prompt, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_peft_in_both_directions(family: str, tmp_path: Path) -> None:
    backbone = tiny(family)
    inputs = batch(backbone)
    task_type = TASK_TYPES[backbone.family]
    theirs = trained_by_peft(
        family, peft.PromptTuningConfig(task_type=task_type, num_virtual_tokens=5)
    )
    # PEFT leaves the virtual tokens on what it returns; an encoder-decoder's answers have none.
    cut = 0 if family == "t5" else 5
    read = SoftPrompt.restore(
        {"kind": "soft_prompt"}, files_of(theirs, tmp_path / "theirs"), backbone
    )
    expected = values(theirs, inputs)[:, cut:]
    real = ... if family == "t5" else inputs["attention_mask"].bool()
    found = laws.plugged(backbone, [read], inputs)
    assert (found - bare(backbone, inputs)).abs().max() > 1e-2
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=0)

    again = in_peft(read, family, tmp_path / "ours")
    torch.testing.assert_close(values(again, inputs)[:, cut:][real], found[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_peft(family: str) -> None:
    backbone = tiny(family)
    inputs = batch(backbone)
    inputs["attention_mask"].fill_(1)
    task_type = TASK_TYPES[backbone.family]
    theirs = trained_by_peft(
        family, peft.PromptTuningConfig(task_type=task_type, num_virtual_tokens=4)
    )
    ours = soft_prompt(backbone)
    with torch.no_grad():
        ours.embeddings.copy_(theirs.get_prompt_embedding_to_save("default")[:4])
    answers(theirs, inputs)[:, 0 if family == "t5" else 4 :].square().sum().backward()
    with backbone.slots.plugged([ours]):
        answers(backbone, inputs).square().sum().backward()
    expected = theirs.prompt_encoder["default"].embedding.weight.grad[:4]
    torch.testing.assert_close(ours.embeddings.grad, expected, atol=1e-4, rtol=1e-4)


def test_starts_from_tokens_of_the_vocabulary_a_text_or_their_spread() -> None:
    backbone = tiny("llama")
    table = backbone.model.get_input_embeddings().weight  # type: ignore[operator]
    torch.manual_seed(0)
    drawn = soft_prompt(backbone, tokens=6).embeddings
    assert all((table[3:] == row).all(dim=1).any() for row in drawn)
    text = soft_prompt(backbone, tokens=5, init="text", text="w7 w9").embeddings
    assert torch.equal(text, table[[7, 9, 7, 9, 7]])
    noise = soft_prompt(backbone, tokens=2000, init="random").embeddings
    torch.testing.assert_close(noise.std(dim=0), table[3:].std(dim=0), atol=0.05, rtol=0)
    torch.testing.assert_close(noise.mean(dim=0), table[3:].mean(dim=0), atol=0.05, rtol=0)
    with pytest.raises(UserError, match=r"give brick\.text"):
        soft_prompt(backbone, init="text")


def test_foreign_files_are_refused_with_a_sentence() -> None:
    backbone = tiny("llama")
    brick = soft_prompt(backbone)
    interface, files = brick.interface(), brick.files()
    config = json.loads(files["adapter_config.json"])
    for changed, sentence in (
        ({"peft_type": "P_TUNING"}, "is P_TUNING, not PROMPT_TUNING"),
        ({"num_virtual_tokens": 3}, "tells 3 virtual tokens"),
        ({"encoder_dropout": 0.5}, "uses 'encoder_dropout'"),
    ):
        other = files | {"adapter_config.json": json.dumps(config | changed).encode()}
        with pytest.raises(UserError, match=sentence):
            SoftPrompt.restore(interface, other, backbone)
    wide = soft_prompt(backbone)
    wide.embeddings = torch.nn.Parameter(torch.zeros(4, 48))
    with pytest.raises(UserError, match="48 features, but the backbone 'tiny-llama' has 32"):
        SoftPrompt.restore(interface, wide.files(), backbone)
