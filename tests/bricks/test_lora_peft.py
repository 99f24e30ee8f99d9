"""LoRA against PEFT, the oracle: both directions, every variant and family, gradients too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.lora import LoRA
from cfm_train.bricks.stored import open_brick
from cfm_train.errors import UserError
from cfm_train.library.__main__ import main
from cfm_train.library.store import Library
from tests import brick_laws as laws
from tests.backbones import FAMILIES, FUSED, answers, bare, batch, folder, randomise, tiny
from tests.lora_cases import VARIANTS, lora, maker, restored
from tests.peft_peers import files_of, in_peft, trained_by_peft, values

#: q, v, a projection of the feed-forward and the output: what PEFT calls them in each family.
MODULES = {
    "bert": ["query", "value", "intermediate.dense"],
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc"],
    "t5": ["q", "v", "wi", "wo"],
}


def peft_config(family: str, variant: str, **changed: Any) -> Any:
    hyper = VARIANTS[variant]
    bias = hyper.get("bias", "none")
    return peft.LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 7,
            "target_modules": MODULES[family],
            "use_rslora": hyper.get("rslora", False),
            "use_dora": hyper.get("dora", False),
            "lora_bias": bias == "lora_bias",
            "bias": bias if bias == "lora_only" else "none",
            "fan_in_fan_out": family == "gpt2",
        }
        | changed
    )


#: A rank and an alpha of its own for some modules, by a suffix and by a path.
PATTERNS = {
    "bert": {"value": 2, r"encoder\.layer\.1\..*query": 3},
    "llama": {"v_proj": 2, r"model\.layers\.1\..*q_proj": 3},
    "gpt2": {"c_fc": 2, r"transformer\.h\.1\..*c_attn": 3},
    "t5": {"SelfAttention.v": 2, r"decoder\..*\.q": 3},
}


@pytest.mark.parametrize("mixed", [False, True], ids=["one-rank", "patterns"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_peft_in_both_directions(
    family: str, variant: str, mixed: bool, tmp_path: Path
) -> None:
    """PEFT's adapter runs here with PEFT's logits and gradients, and goes back as it came."""
    ranks = PATTERNS[family]
    patterns = {"rank_pattern": ranks, "alpha_pattern": {k: 3.3 * r for k, r in ranks.items()}}
    config = peft_config(family, variant, **(patterns if mixed else {}))
    theirs = trained_by_peft(family, config)
    files = files_of(theirs, tmp_path / "theirs")
    backbone = tiny(family)
    inputs = batch(backbone)
    brick = restored(files, backbone)
    assert len({A.shape[0] for A in brick.lora_A.values()}) == (3 if mixed else 1)

    expected = values(theirs, inputs)
    assert (expected - bare(backbone, inputs)).abs().max() > 1e-2
    torch.testing.assert_close(laws.plugged(backbone, [brick], inputs), expected, atol=1e-5, rtol=0)

    exported = in_peft(brick, family, tmp_path / "ours")
    assert torch.equal(values(exported, inputs), expected)

    compare_gradients(brick, theirs, backbone, inputs)


def compare_gradients(
    brick: LoRA, theirs: Any, backbone: Backbone, inputs: dict[str, Tensor]
) -> None:
    """Every parameter's gradient of one loss equals PEFT's."""
    brick.requires_grad_(True).zero_grad()
    theirs.zero_grad()
    for parameter in theirs.parameters():
        parameter.grad = None
    with backbone.slots.plugged([brick]):
        answers(backbone, inputs).square().mean().backward()
    answers(theirs, inputs).square().mean().backward()
    found = {
        name: p.grad.abs().sum().item()
        for name, p in theirs.named_parameters()
        if p.requires_grad and p.grad is not None
    }
    by_name = dict(theirs.named_parameters())
    parts = {
        "lora_A": (brick.lora_A, ".lora_A.default.weight"),
        "lora_B": (brick.lora_B, ".lora_B.default.weight"),
        "magnitude": (brick.magnitude, ".lora_magnitude_vector.default.weight"),
        "bias": (
            brick.bias,
            ".base_layer.bias" if brick.hyper["bias"] == "lora_only" else ".lora_B.default.bias",
        ),
    }
    compared = 0
    for own, suffix in parts.values():
        for site in brick.site_names:
            key = site.replace(".", "-")
            if key in own:
                peer = by_name[f"base_model.model.{brick.built_for[site].module}{suffix}"]
                torch.testing.assert_close(own[key].grad, peer.grad, atol=1e-6, rtol=1e-4)
                compared += 1
    assert compared == len(found) == sum(1 for _ in brick.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", [*FAMILIES, *FUSED])
def test_made_here_runs_in_peft(family: str, variant: str, tmp_path: Path) -> None:
    """On GPT-2 q and v are slices of c_attn: one block adapter for PEFT, taken apart again here."""
    laws.round_trips(maker(variant), family)
    backbone = tiny(family)
    inputs = batch(backbone)
    brick = laws.random_brick(maker(variant, layers=[-1]), backbone)
    assert all(backbone.sites[name].layer == 1 for name in brick.site_names)
    ours = laws.plugged(backbone, [brick], inputs)
    theirs = in_peft(brick, family, tmp_path / "ours")  # type: ignore[arg-type]
    torch.testing.assert_close(values(theirs, inputs), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_slices_of_different_ranks_and_scales_are_one_adapter(variant: str, tmp_path: Path) -> None:
    backbone = tiny("gpt2")
    inputs = batch(backbone)
    brick = lora(backbone, **VARIANTS[variant], sites=["attn.q", "ffn.up"])
    wider = lora(backbone, **VARIANTS[variant], sites=["attn.k"], rank=6, alpha=5)
    for name in wider.site_names:
        key, site = name.replace(".", "-"), backbone.sites[name]
        parts = [d.get(key, None) for d in (wider.magnitude, wider.bias)]
        brick.add_site(site, wider.lora_A[key], wider.lora_B[key], 5, *parts)
        brick.know(backbone, site)
    randomise(brick.eval())
    ours = laws.plugged(backbone, [brick], inputs)
    theirs = in_peft(brick, "gpt2", tmp_path / "ours")
    torch.testing.assert_close(values(theirs, inputs), ours, atol=1e-5, rtol=0)
    again = LoRA.restore(json.loads(json.dumps(brick.interface())), brick.files(), backbone)
    torch.testing.assert_close(
        laws.plugged(backbone, [again.eval()], inputs), ours, atol=1e-5, rtol=0
    )
    # From here on nothing is folded any more: in and out without losing a bit.
    assert again.files() == brick.files()
    assert {A.shape[0] for A in again.lora_A.values()} == {4, 6}


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_dropout_is_pefts(variant: str, tmp_path: Path) -> None:
    """The same generator state drops the same features, in training mode alone."""
    theirs = trained_by_peft("llama", peft_config("llama", variant, lora_dropout=0.5))
    backbone = tiny("llama")
    inputs = batch(backbone)
    brick = restored(files_of(theirs, tmp_path), backbone)
    assert brick.hyper["dropout"] == 0.5
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.train()
    torch.manual_seed(5)
    expected = values(theirs, inputs)
    torch.manual_seed(5)
    found = laws.plugged(backbone, [brick.train()], inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    quiet = laws.plugged(backbone, [brick.eval()], inputs)
    assert (found - quiet).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_language_model_head(family: str, tmp_path: Path) -> None:
    """GPT-2's head shares its weight with the embedding, which stays as it is."""
    theirs = trained_by_peft(family, peft_config(family, "lora", target_modules=["lm_head"]))
    backbone = tiny(family)
    inputs = batch(backbone)
    brick = restored(files_of(theirs, tmp_path), backbone)
    assert brick.site_names == ("head",)
    torch.testing.assert_close(
        laws.plugged(backbone, [brick], inputs), values(theirs, inputs), atol=1e-5, rtol=0
    )


def test_adapter_of_a_wrapped_class_finds_its_modules(tmp_path: Path) -> None:
    """PEFT trained a classifier: ``bert.`` stands before every path, and its head lies aside."""
    import transformers as tf

    classifier = tf.BertForSequenceClassification.from_pretrained(folder("bert"))
    config = peft_config("bert", "lora", task_type="SEQ_CLS")
    theirs = peft.get_peft_model(classifier, config).eval()
    randomise(torch.nn.ParameterList(p for n, p in theirs.named_parameters() if "lora_" in n))
    files = files_of(theirs, tmp_path)
    assert b"classifier" in files["adapter_model.safetensors"]
    backbone = tiny("bert")
    inputs = batch(backbone)
    body = theirs.base_model.model.bert
    torch.testing.assert_close(
        laws.plugged(backbone, [restored(files, backbone)], inputs),
        values(body, inputs),
        atol=1e-5,
        rtol=0,
    )


def test_a_module_of_the_backbone_that_was_trained_whole_is_refused(tmp_path: Path) -> None:
    """The adapter's own ``lm_head`` would be ignored, and the answers be others than PEFT's."""
    import transformers as tf

    model = tf.LlamaForCausalLM.from_pretrained(folder("llama"))
    for name, own in (("without", None), ("with", ["lm_head"])):
        config = peft_config("llama", "lora", modules_to_save=own, task_type="CAUSAL_LM")
        peft.get_peft_model(model, config).save_pretrained(tmp_path / name)
        model = tf.LlamaForCausalLM.from_pretrained(folder("llama"))
        assert (
            main(
                [
                    "--library",
                    str(tmp_path / "library"),
                    "add",
                    str(tmp_path / name),
                    "--name",
                    name,
                ]
            )
            == 0
        )
    library, backbone = Library(tmp_path / "library"), tiny("llama")
    open_brick(library.find("without"), library, backbone)
    with pytest.raises(UserError, match=r"a 'lm_head' of its own .*backbone 'tiny-llama'"):
        open_brick(library.find("with"), library, backbone)
