"""What a brick of kind ``peft`` refuses: company at its sites, features, files, options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from cfm_train.bricks.kinds import make_brick
from cfm_train.bricks.peft import Peft
from cfm_train.bricks.peft_options import check_options
from cfm_train.config.compose import option
from cfm_train.errors import UserError
from tests import brick_laws as laws
from tests.backbones import batch, randomise, tiny
from tests.peft_peers import files_of, trained_by_peft
from tests.peft_tuners import make, peft_config, small, tuners


def _lora(backbone: Any, sites: list[str]) -> Any:
    return make_brick({**option("brick", "lora"), "sites": sites}).build(backbone)


class TestAlone:
    def test_another_brick_on_the_same_rows_is_refused(self) -> None:
        backbone = tiny("llama")
        vera, other = make("vera", backbone), make("boft", backbone)
        with pytest.raises(UserError, match=r"'layer\.0\.attn\.q' runs through PEFT, which needs"):
            backbone.slots.plug([vera, other])
        assert backbone.slots.plan == []
        half = torch.tensor([1.0, 0, 0, 1])
        with pytest.raises(UserError, match="to itself"):
            backbone.slots.plug([vera, other], [half, torch.tensor([1.0, 0, 0, 0])])
        with pytest.raises(UserError, match="to itself"):
            tokens = torch.zeros(4, 9)
            tokens[3, 2] = 0.5
            backbone.slots.plug([vera, other], [half, tokens])

    def test_parts_of_one_module_are_one_module(self) -> None:
        backbone = tiny("gpt2")
        lora = _lora(backbone, ["attn.k"])
        with pytest.raises(UserError, match="runs through PEFT"):
            backbone.slots.plug([lora, make("vera", backbone)])

    def test_other_rows_and_other_sites_are_free(self) -> None:
        backbone, inputs = tiny("llama"), batch(tiny("llama"))
        vera, lora = make("vera", backbone).eval(), _lora(backbone, ["attn.q", "attn.o"]).eval()
        randomise(vera), randomise(lora)
        rows = [torch.tensor([1.0, 0, 1, 0]), torch.tensor([0.0, 1, 0, 1])]
        mixed = laws.plugged(backbone, [vera, lora], inputs, rows)
        alone = [laws.plugged(backbone, [brick], inputs) for brick in (vera, lora)]
        for row in range(4):
            torch.testing.assert_close(mixed[row], alone[row % 2][row], atol=1e-5, rtol=0)
        beside = _lora(backbone, ["attn.o"])
        with backbone.slots.plugged([vera, beside]):
            pass


class TestFiles:
    """What does not fit is refused by name."""

    def files(self, tmp_path: Path) -> dict[str, bytes]:
        backbone = tiny("bert")
        return files_of(trained_by_peft("bert", peft_config("loha", backbone)), tmp_path / "a")

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"bias": "all"}, "bias=all, which trains the biases of the backbone"),
            ({"init_lora_weights": "pissa"}, "'pissa', which rewrites the weights"),
            ({"target_parameters": ["a"]}, "target_parameters, which replaces parameters"),
            ({"peft_type": "XLORA"}, "PEFT's xlora: it mixes LoRA adapters"),
            ({"target_modules": ["nothing"]}, "Target modules .*nothing.* not found"),
            ({"r": 3}, "does not fit the backbone: size mismatch"),
            ({"news": 1}, "unexpected keyword argument 'news'"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_configs(self, change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
        files = self.files(tmp_path)
        config = json.loads(files["adapter_config.json"]) | change
        files["adapter_config.json"] = json.dumps(config).encode()
        with pytest.raises(UserError, match=sentence):
            Peft.restore({}, files, tiny("bert"))

    def test_tensors(self, tmp_path: Path) -> None:
        files = self.files(tmp_path)
        tensors = load(files["adapter_model.safetensors"])
        first = min(tensors)
        lacking = {name: value for name, value in tensors.items() if name != first}
        for changed, sentence in (
            (lacking, f"misses the tensor '{first}'"),
            ({**tensors, "new": tensors[first].clone()}, "does not use, 'new'"),
        ):
            files["adapter_model.safetensors"] = save(changed)
            with pytest.raises(UserError, match=sentence):
                Peft.restore({}, files, tiny("bert"))

    def test_another_backbone(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="not found in the base model"):
            Peft.restore({}, self.files(tmp_path), tiny("llama"))


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"rr": 4}, r"brick\.options\.rr is no option of PEFT's vera\. Did you mean"),
            ({"r": "four"}, r"brick\.options\.r='four' does not fit: PEFT's vera takes int"),
            ({"target_modules": ["q"]}, "is set from brick.sites"),
            ({"bias": "all"}, "trains the biases of the backbone itself"),
        ],
    )
    def test_wrong_options(self, options: dict[str, Any], sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            check_options("vera", options)

    @pytest.mark.parametrize(
        ("tuner", "options", "sentence"),
        [
            ("veera", {}, "PEFT has no tuner 'veera'. Did you mean 'vera'"),
            ("lora", {}, "choose brick=lora instead"),
            ("lily", {}, "a row's answer would depend on the others"),
            ("adalora", {"init_lora_weights": "olora"}, "rewrites the weights of the backbone"),
            ("adalora", {"init_lora_weights": "pissa"}, "rewrites the weights of the backbone"),
            ("adalora", {"init_lora_weights": "corda"}, "rewrites the weights of the backbone"),
            ("adalora", {"init_lora_weights": "eva"}, "needs a pass over the data"),
            ("adalora", {"use_rslora": True}, "PEFT's adalora ignores"),
            ("adamss", {"use_asa": True}, "a state that a killed run would lose"),
        ],
    )
    def test_wrong_tuners(self, tuner: str, options: dict[str, Any], sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            check_options(tuner, options)

    @pytest.mark.parametrize("name", tuners())
    def test_every_yaml_names_options_of_its_tuner(self, name: str) -> None:
        section = option("brick", name)
        assert section["tuner"] == name
        check_options(name, section["options"])

    def test_values_that_peft_refuses_are_a_sentence(self) -> None:
        section = {**small("oft"), "options": {**small("oft")["options"], "r": 8}}
        with pytest.raises(UserError, match="PEFT's oft does not work on the backbone 'tiny-bert'"):
            make_brick(section).build(tiny("bert"))
