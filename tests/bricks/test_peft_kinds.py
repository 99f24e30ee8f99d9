"""PEFT's tuners as bricks: the laws of every kind, and PEFT as the oracle.

Which of them start as identity, and that unplugging is exact, is in `test_kinds_table.py`.
"""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor

from cfm_train.bricks.peft import Peft
from cfm_train.bricks.peft_options import OURS, REFUSED
from cfm_train.bricks.stored import open_brick, store
from cfm_train.errors import UserError
from cfm_train.library.__main__ import main
from cfm_train.library.peft_catalogue import config_fields
from cfm_train.library.peft_format import read_folder
from cfm_train.library.store import Library
from tests import brick_laws as laws
from tests.backbones import FAMILIES, answers, batch, folder, plain_model, randomise, tiny
from tests.peft_peers import files_of, in_peft, trained_by_peft, values
from tests.peft_tuners import make, peft_config, tuners

#: Tuners for which PEFT takes no Conv1D, the linear layer of GPT-2.
WITHOUT_CONV1D = frozenset(
    {"adamss", "beft", "boft", "c3a", "delora", "glora", "hra", "loha", "lokr", "miss", "oft"}
    | {"peanut", "psoft", "road", "shira", "supertuning"}
)
CASES = [
    (name, family)
    for name in tuners()
    for family in FAMILIES
    if family != "gpt2" or name not in WITHOUT_CONV1D
]


def unmasked(name: str, family: str) -> dict[str, Tensor]:
    """A batch without padding: PEFT puts a prompt before the padding of a row, too."""
    inputs = batch(tiny(family))
    inputs["attention_mask"].fill_(1)
    inputs["input_ids"].clamp_(min=3)
    return inputs


def tail(found: Tensor, like: Tensor) -> Tensor:
    """PEFT's answers on the real tokens: its prompts lengthen the answer."""
    return found[:, -like.shape[1] :]


def test_there_is_a_yaml_for_every_tuner_that_runs() -> None:
    everything = {name.lower() for name in config_fields()}
    assert set(tuners()) == everything - REFUSED.keys() - OURS.keys()


@pytest.mark.parametrize(("name", "family"), CASES)
class TestLaws:
    def test_rows_are_their_own(self, name: str, family: str) -> None:
        # A prompt widens the rows without it too: their last bits move.
        untouched = 1e-5 if name == "p_tuning" else 1e-6
        laws.rows_are_their_own(functools.partial(make, name), family, untouched=untouched)

    def test_only_the_brick_learns(self, name: str, family: str) -> None:
        laws.only_the_brick_learns(functools.partial(make, name), family)

    def test_round_trips(self, name: str, family: str) -> None:
        laws.round_trips(functools.partial(make, name), family)

    def test_an_adapter_of_peft_runs_here(self, name: str, family: str, tmp_path: Path) -> None:
        backbone, inputs = tiny(family), unmasked(name, family)
        checksum = backbone.checksum()
        model = trained_by_peft(family, peft_config(name, backbone))
        files, expected = files_of(model, tmp_path / "a"), values(model, inputs)
        adapter = read_folder(tmp_path / "a")
        assert adapter.kind == "peft"
        brick = Peft.restore(adapter.interface, files, backbone).eval()
        found = laws.plugged(backbone, [brick], inputs)
        torch.testing.assert_close(found, tail(expected, found), atol=1e-5, rtol=0)
        assert backbone.checksum() == checksum


@pytest.mark.parametrize("name", tuners())
def test_recomputed_layers_give_the_same_gradients(name: str) -> None:
    laws.recomputes_the_same(functools.partial(make, name), "llama")


@pytest.mark.parametrize("name", ["vera", "boft", "p_tuning"])
def test_generation_with_a_cache(name: str) -> None:
    laws.generates_with_a_cache(functools.partial(make, name), "llama")


@pytest.mark.parametrize("name", sorted(WITHOUT_CONV1D))
def test_what_peft_does_not_adapt_is_a_sentence(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"PEFT's {name} does not work on the backbone 'tiny-gpt2'"
    ):
        make(name, tiny("gpt2"))


def test_only_the_bricks_parameters_are_its_state() -> None:
    backbone = tiny("bert")
    before = set(backbone.model.state_dict())
    brick = make("vera", backbone)
    theirs = {id(value) for value in backbone.parameters()}
    with backbone.slots.plugged([brick]):
        assert set(backbone.model.state_dict()) == before
        assert not theirs & {id(value) for value in brick.parameters()}
        assert not any("base_layer" in name for name in brick.state_dict())


class TestNamesOfOtherWrappers:
    """Adapters trained on a class around the body, or on the body without its head."""

    def test_a_prefix_is_understood(self, tmp_path: Path) -> None:
        model = tf.BertForSequenceClassification.from_pretrained(folder("bert")).eval()
        config = peft.VeraConfig(r=8, target_modules=["query", "output.dense"], task_type="SEQ_CLS")
        adapted = peft.get_peft_model(model, config).eval()
        randomise(torch.nn.ParameterList(p for p in adapted.parameters() if p.requires_grad))
        files, backbone = files_of(adapted, tmp_path / "a"), tiny("bert")
        adapter = read_folder(tmp_path / "a")
        assert adapter.aside  # the classifier, which is kept for export alone
        brick = Peft.restore(adapter.interface, files, backbone).eval()
        inputs = batch(backbone)
        with torch.no_grad():
            expected = answers(adapted.base_model.model.bert, inputs)
        found = laws.plugged(backbone, [brick], inputs)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert "layer.0.attn.o" in brick.site_names

    def test_a_body_without_its_head_is_understood(self, tmp_path: Path) -> None:
        body = tf.LlamaModel.from_pretrained(folder("llama")).eval()
        config = peft.LoHaConfig(r=4, target_modules=["q_proj", "down_proj"])
        adapted = peft.get_peft_model(body, config).eval()
        randomise(torch.nn.ParameterList(p for p in adapted.parameters() if p.requires_grad))
        files, backbone = files_of(adapted, tmp_path / "a"), tiny("llama")
        brick = Peft.restore(read_folder(tmp_path / "a").interface, files, backbone).eval()
        inputs = batch(backbone)
        with torch.no_grad():
            expected = answers(adapted, inputs)
        with backbone.slots.plugged([brick]), torch.inference_mode():
            found = backbone.hidden_states(**inputs)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tuner", ["lora", "ia3"])
def test_what_is_our_own_kind_runs_through_peft_too(
    tuner: str, family: str, tmp_path: Path
) -> None:
    backbone = tiny(family)
    modules = {site.module for site in backbone.sites.select(["attn.q", "ffn.down"])}
    down = {site.module for site in backbone.sites.select(["ffn.down"])}
    config: Any = peft.LoraConfig(r=4, target_modules=sorted(modules), use_dora=True)
    if tuner == "ia3":
        config = peft.IA3Config(target_modules=sorted(modules), feedforward_modules=sorted(down))
    model = trained_by_peft(family, config)
    files, inputs = files_of(model, tmp_path / "a"), unmasked(tuner, family)
    brick = Peft.restore(read_folder(tmp_path / "a", "peft").interface, files, backbone).eval()
    found = laws.plugged(backbone, [brick], inputs)
    torch.testing.assert_close(found, values(model, inputs), atol=1e-5, rtol=0)


def test_made_here_it_runs_in_peft_when_ranks_were_cut(tmp_path: Path) -> None:
    """AdaLoRA after training: the file holds the ranks that are left, and PEFT agrees."""
    backbone, inputs = tiny("llama"), unmasked("adalora", "llama")
    brick = make("adalora", backbone).train()
    optimizer = torch.optim.AdamW([p for p in brick.parameters() if p.requires_grad], lr=0.05)
    with backbone.slots.plugged([brick]):
        for step in range(20):
            optimizer.zero_grad()
            (answers(backbone, inputs).square().mean() + brick.penalty()).backward()
            optimizer.step()
            brick.after_step(step + 1, 20)
    brick.eval()
    expected = laws.plugged(backbone, [brick], inputs)
    files = brick.files()
    pattern = json.loads(files["adapter_config.json"])["rank_pattern"]
    ranks = [sum(kept) for kept in pattern.values()]
    assert sum(ranks) == 4 * len(ranks) and len(set(ranks)) > 1  # target_r on average, not alike
    theirs = in_peft(brick, "llama", tmp_path / "b")
    torch.testing.assert_close(values(theirs, inputs), expected, atol=1e-5, rtol=0)
    again = Peft.restore(brick.interface(), files, backbone).eval()
    found = laws.plugged(backbone, [again], inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert again.files()["adapter_model.safetensors"] == files["adapter_model.safetensors"]


def test_a_killed_run_goes_on_with_the_same_ranks() -> None:
    """What a checkpoint holds, a new brick goes on from: equal to the bit after more steps."""
    backbone, inputs = tiny("bert"), batch(tiny("bert"))
    total = 24

    def train(brick: Any, optimizer: Any, steps: range) -> None:
        brick.train()
        with backbone.slots.plugged([brick]):
            for step in steps:
                optimizer.zero_grad()
                (answers(backbone, inputs).square().mean() + brick.penalty()).backward()
                optimizer.step()
                brick.after_step(step + 1, total)

    def started() -> tuple[Any, Any]:
        brick = make("adalora", backbone)
        trained = [p for p in brick.parameters() if p.requires_grad]
        return brick, torch.optim.AdamW(trained, lr=0.05)

    straight, optimizer = started()
    train(straight, optimizer, range(total))
    first, optimizer = started()
    train(first, optimizer, range(11))
    buffer = io.BytesIO()
    torch.save({"brick": first.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    second, optimizer = started()
    second.load_state_dict(state["brick"])
    optimizer.load_state_dict(state["optimizer"])
    train(second, optimizer, range(11, total))
    assert second.files() == straight.files()
    for (name, one), other in zip(
        straight.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_through_the_library_and_out_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone, inputs = tiny("llama"), unmasked("loha", "llama")
    model = trained_by_peft("llama", peft_config("loha", backbone))
    files_of(model, tmp_path / "in")
    expected, at = values(model, inputs), str(tmp_path / "library")
    added = ["add", str(tmp_path / "in"), "--name", "a", "--backbone", backbone.fingerprint]
    assert main(["--library", at, *added]) == 0
    assert main(["--library", at, "export", "a", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    library = Library(at)
    brick = open_brick(library.find("a"), library, backbone)
    found = laws.plugged(backbone, [brick], inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    again = peft.PeftModel.from_pretrained(plain_model("llama"), tmp_path / "out").eval()
    assert torch.equal(values(again, inputs), expected)
    # Stored anew, it is the same brick with our hyper-parameters in its card.
    card = store(brick, library, backbone, name="b", operation="add")
    same = open_brick(library.find("b"), library, backbone)
    assert card.sites == list(brick.site_names)
    assert torch.equal(laws.plugged(backbone, [same], inputs), found)
