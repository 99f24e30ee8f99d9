"""PEFT's adapters in and out, with PEFT itself: nothing lost, nothing accepted unseen."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from cfm_train.errors import UserError
from cfm_train.library.__main__ import main
from cfm_train.library.folders import export
from cfm_train.library.peft_catalogue import config_keys
from cfm_train.library.peft_checks import KINDS
from cfm_train.library.peft_format import (
    aside_tensors,
    function_of,
    read_config,
    read_folder,
)

BERT = BertConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
)
LLAMA = LlamaConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=24,
)


def backbone(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    make = {
        "bert": lambda: BertModel(BERT),
        "bert-task": lambda: BertForSequenceClassification(BERT),
        "llama": lambda: LlamaForCausalLM(LLAMA),
    }
    return make[family]().eval()


def output(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(1, 13).reshape(2, 6)
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]


def trained(family: str, config: peft.PeftConfig, folder: Path) -> torch.Tensor:
    """Saves an adapter whose every parameter is random, and returns what its model computes."""
    model = get_peft_model(backbone(family), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3, generator=generator)
    model.save_pretrained(folder)
    return output(model)


LORAS = {
    "plain": {"target_modules": ["query", "value"]},
    "rslora": {"target_modules": ["query"], "use_rslora": True, "lora_alpha": 3},
    "dora": {"target_modules": ["query", "value"], "use_dora": True},
    "patterns": {
        "target_modules": ["query", "value"],
        "rank_pattern": {"layer.1.attention.self.query": 5},
        "alpha_pattern": {"^encoder.layer.0.attention.self.value": 7},
    },
    "own bias": {"target_modules": ["query"], "lora_bias": True},
    "lora_only": {"target_modules": ["query", "dense"], "bias": "lora_only"},
    "one layer": {"target_modules": ["query"], "layers_to_transform": [0]},
    "regular expression": {"target_modules": r".*layer\.1\..*(query|key)"},
    "gaussian": {"target_modules": ["query"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("case", LORAS)
def test_lora_of_bert_comes_back_as_it_went(case, local, tmp_path):
    """PEFT's folder, added, exported: the same tensors, and the same output in PEFT."""
    expected = trained("bert", peft.LoraConfig(r=2, **LORAS[case]), tmp_path / "in")
    assert main(["--library", local.root, "add", str(tmp_path / "in"), "--name", "a"]) == 0
    card = local.find("a")
    assert card.kind == "lora" and card.requires == [] and local.verify() == []

    export(local, card, tmp_path / "out")
    before = load_file(tmp_path / "in" / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for folder in (tmp_path / "out", local.folder(card)):
        model = PeftModel.from_pretrained(backbone("bert"), folder).eval()
        assert torch.equal(output(model), expected)


#: Tuners that PEFT can put on a tiny Llama (it refuses some: no matter here, see docs).
OTHERS = sorted(
    {
        "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "LN_TUNING", "HRA", "FOURIERFT", "VBLORA",
        "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "ADALORA", "RANDLORA", "C3A", "SHIRA",
    }
)  # fmt: skip


@pytest.mark.parametrize("peft_type", OTHERS)
def test_other_tuners_are_kept_as_they_are(peft_type, local, tmp_path):
    targets = {"target_modules": ["q_proj", "down_proj"]}
    extra = {
        "IA3": {**targets, "feedforward_modules": ["down_proj"]},
        "LN_TUNING": {"target_modules": ["input_layernorm"]},
        "OFT": {**targets, "oft_block_size": 4},
        "BOFT": {**targets, "boft_block_size": 4},
        "VERA": {**targets, "r": 4},
        "RANDLORA": {**targets, "r": 4},
        "VBLORA": {"target_modules": ["q_proj"], "num_vectors": 8, "vector_length": 4},
        "FOURIERFT": {**targets, "n_frequency": 10},
        "C3A": {"target_modules": ["q_proj"], "block_size": 4},
        "SHIRA": {**targets, "r": 2},
        "ADALORA": {**targets, "total_step": 10},
        "PROMPT_TUNING": {"num_virtual_tokens": 3},
        "PREFIX_TUNING": {"num_virtual_tokens": 3},
        "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    }.get(peft_type, targets)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](task_type="CAUSAL_LM", **extra)
    expected = trained("llama", config, tmp_path / "in")
    assert main(["--library", local.root, "add", str(tmp_path / "in"), "--name", "a"]) == 0
    card = local.find("a")
    assert card.kind == KINDS.get(peft_type, "peft")
    assert card.interface["peft"]["peft_type"] == peft_type
    export(local, card, tmp_path / "out")
    model = PeftModel.from_pretrained(backbone("llama"), tmp_path / "out").eval()
    assert torch.equal(output(model), expected)


def test_lora_of_llama(local, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules="all-linear")
    expected = trained("llama", config, tmp_path / "in")
    assert main(["--library", local.root, "add", str(tmp_path / "in"), "--name", "a"]) == 0
    model = PeftModel.from_pretrained(backbone("llama"), local.folder(local.find("a"))).eval()
    assert torch.equal(output(model), expected)


def test_a_classifier_is_kept_aside_and_named(local, tmp_path, capsys):
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    expected = trained("bert-task", config, tmp_path / "in")
    adapter = read_folder(tmp_path / "in")
    assert adapter.kind == "lora"
    assert adapter.aside == [
        "base_model.model.classifier.bias",
        "base_model.model.classifier.weight",
    ]
    assert main(["--library", local.root, "add", str(tmp_path / "in"), "--name", "a"]) == 0
    assert "base_model.model.classifier.bias, …) are kept for export" in capsys.readouterr().out
    export(local, local.find("a"), tmp_path / "out")
    model = PeftModel.from_pretrained(backbone("bert-task"), tmp_path / "out").eval()
    assert torch.equal(output(model), expected)


def test_aside_tensors_are_whole_modules_only():
    names = ["m.score.weight", "score.bias", "m.scores.weight", "m.score.lora_A.weight", "x.score"]
    assert aside_tensors({"modules_to_save": ["score"]}, names) == ["m.score.weight", "score.bias"]
    assert aside_tensors({"modules_to_save": None}, names) == []
    assert aside_tensors({"modules_to_save": ["a.b"]}, ["x.aXb.weight", "x.a.b.weight"]) == [
        "x.a.b.weight"
    ]


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_init_that_rewrites_the_backbone_is_refused_until_converted(init, local, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=init)
    original = tmp_path / "original"
    model = get_peft_model(backbone("bert"), config).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(original)
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "in")
    for kind in (None, "lora", "peft"):
        with pytest.raises(
            UserError, match=f"'{init}', which rewrites the weights of the backbone"
        ):
            read_folder(tmp_path / "in", kind)

    expected = output(model)
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(original)
    )
    assert main(["--library", local.root, "add", str(tmp_path / "plain"), "--name", "a"]) == 0
    again = PeftModel.from_pretrained(backbone("bert"), local.folder(local.find("a"))).eval()
    assert torch.allclose(output(again), expected, atol=1e-5)


def changed(folder: Path, to: Path, **keys: object) -> Path:
    """A copy of an adapter with some keys of its config changed."""
    shutil.copytree(folder, to)
    path = to / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return to


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    trained("bert", peft.LoraConfig(r=2, target_modules=["query", "value"]), folder)
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["experts.down"]),
        ("trainable_token_indices", [3]),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1}),
        ("arrow_config", {"top_k": 1}),
        ("use_new_thing", True),
        ("new_scale", 0),
    ],
)
def test_features_that_a_lora_brick_does_not_compute_are_refused(plain, tmp_path, key, value):
    folder = changed(plain, tmp_path / "a", **{key: value})
    with pytest.raises(UserError, match=f"uses '{key}'.*--kind peft"):
        read_folder(folder)
    if key in config_keys()["LORA"]:
        assert read_folder(folder, "peft").kind == "peft"
    else:
        with pytest.raises(UserError, match=f"the key '{key}'.*would ignore: update PEFT"):
            read_folder(folder, "peft")


def test_every_key_of_lora_is_either_computed_or_refused(plain, tmp_path):
    """A key that PEFT adds some day is in neither list, and so is refused when it is used."""
    from cfm_train.library.peft_checks import COMPUTED, DESCRIPTIVE

    defaults = read_config(plain)
    for key in config_keys()["LORA"] - COMPUTED["lora"] - DESCRIPTIVE:
        with pytest.raises(UserError):
            read_folder(changed(plain, tmp_path / key, **{key: defaults.get(key) or "used"}))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"bias": "all"}, "bias: all"),
        ({"init_lora_weights": "loftq"}, "rewrites the weights"),
        ({"loftq_config": {"loftq_bits": 4}}, "rewrites the weights"),
        ({"peft_type": "LOWRA"}, r"type LOWRA, which the installed PEFT does not know. Did you"),
        ({"peft_type": None}, "names no 'peft_type'"),
    ],
)
def test_other_configs_that_are_refused(plain, tmp_path, keys, sentence):
    with pytest.raises(UserError, match=sentence):
        read_folder(changed(plain, tmp_path / "a", **keys))


def test_kind_lora_is_for_lora_alone(plain, tmp_path):
    with pytest.raises(UserError, match="is IA3, not LORA"):
        read_folder(changed(plain, tmp_path / "a", peft_type="IA3"), "lora")
    assert read_folder(plain, "peft").kind == "peft"
    with pytest.raises(UserError, match="is LORA, not IA3"):
        read_folder(plain, "ia3")
    with pytest.raises(UserError, match="which a brick of kind ia3 does not compute"):
        read_folder(changed(plain, tmp_path / "b", peft_type="IA3"))
    folder = changed(plain, tmp_path / "c")
    config = {"peft_type": "IA3", "target_modules": ["query"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"lora_A\.weight', which is no part of a brick of kind ia3"
    ):
        read_folder(folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("base_model.model.encoder.layer.0.attention.self.query.lora_B.weight"),
         "no lora_A and lora_B for 'base_model.model.encoder.layer.0.attention.self.query'"),
        (lambda t: t.update({"base_model.model.embeddings.weight": torch.ones(2, 2)}),
         "'base_model.model.embeddings.weight', which is no part of a brick of kind lora"),
        (lambda t: t.update({"base_model.model.encoder.layer.0.output.dense.bias": torch.ones(2)}),
         "no lora_A and lora_B for .*output.dense"),
        (lambda t: t.clear(), "holds no tensor"),
        (lambda t: next(iter(t.values())).fill_(float("nan")), "NaN or infinite"),
        (lambda t: t.update({n: v[:1] for n, v in t.items() if "self.query.lora_A" in n}),
         "no lora_A and lora_B"),
    ],
    ids=["missing", "embedding", "bias alone", "empty", "nan", "rank"],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(plain, tmp_path, change, sentence):
    shutil.copytree(plain, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)
    with pytest.raises(UserError, match=sentence):
        read_folder(tmp_path / "a")


def test_folders_that_are_no_adapters(plain, tmp_path):
    with pytest.raises(UserError, match="There is no folder"):
        read_folder(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no PEFT adapter: it has no adapter_config\.json"):
        read_folder(tmp_path / "empty")
    broken = changed(plain, tmp_path / "broken")
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_folder(broken)
    pickled = changed(plain, tmp_path / "pickled")
    tensors = load_file(pickled / "adapter_model.safetensors")
    (pickled / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks adapter_model\.safetensors"):
        read_folder(pickled)
    torch.save(tensors, pickled / "adapter_model.bin")
    with pytest.raises(UserError, match=r"'adapter_model\.bin' of .* is a pickle"):
        read_folder(pickled)


def test_the_catalogue_is_what_peft_says_of_itself():
    """Read from the source with `ast`; here against the imported classes."""
    catalogue = config_keys()
    for peft_type, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        fields = {field.name for field in dataclasses.fields(config)}
        assert catalogue[getattr(peft_type, "value", peft_type)] == fields


def test_the_interface_ignores_the_order_of_sets_and_what_describes():
    one = {
        "peft_type": "LORA",
        "target_modules": ["q", "v"],
        "r": 0,
        "use_dora": False,
        "revision": "a",
    }
    two = {"peft_type": "LORA", "target_modules": ["v", "q"], "r": 0, "peft_version": "9"}
    assert function_of(one) == function_of(two) == {
        "peft_type": "LORA", "target_modules": ["q", "v"], "r": 0,
    }  # fmt: skip


def test_export_keeps_heads_aside_and_refuses_other_kinds(local, plain, bricks, tmp_path):
    heads = bricks.files(5)["brick.safetensors"]
    files = {**{p.name: p for p in plain.glob("adapter_*")}, "heads.safetensors": heads}
    card = local.add(files, bricks.card("headed"))
    written = export(local, card, tmp_path / "out")
    assert written == sorted(
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    )
    assert (tmp_path / "out" / "cfm_train" / "heads.safetensors").read_bytes() == heads
    PeftModel.from_pretrained(backbone("bert"), tmp_path / "out")
    with pytest.raises(UserError, match="is not an empty folder"):
        export(local, card, tmp_path / "out")
    with pytest.raises(UserError, match="for which PEFT has no format"):
        export(local, bricks.add(local), tmp_path / "other")
    assert not (tmp_path / "other").exists()
