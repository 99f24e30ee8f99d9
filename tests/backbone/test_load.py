"""Loading: frozen, without a task head, the same numbers as transformers, and no network."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import yaml
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file

from cfm_train.backbone.dtypes import cpu_bfloat16_flags, native_dtype
from cfm_train.backbone.load import Backbone, load_backbone
from cfm_train.backbone.pretrained import load_tokenizer
from cfm_train.backbone.spec import resolve
from cfm_train.errors import UserError
from cfm_train.paths import ROOT
from tests.backbones import answers, batch, tiny

MINILM = yaml.safe_load((ROOT / "conf/backbone/minilm.yaml").read_text())


def load(folder: Path, dtype: str = "float32") -> Backbone:
    return load_backbone(resolve({"path": str(folder)}), dtype=dtype)


@pytest.fixture(scope="module")
def minilm() -> Backbone:
    return load_backbone(resolve(MINILM), dtype="float32")


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """Saves a tiny model with MiniLM's tokenizer beside it; returns its folder."""

    def save(name: str, **changes: Any) -> Path:
        torch.manual_seed(0)
        config = ARCHITECTURES[name].config()
        for key, value in changes.items():
            setattr(config, key, value)
        folder = tmp_path / name
        ARCHITECTURES[name].auto.from_config(config).save_pretrained(folder)
        tf.AutoTokenizer.from_pretrained(resolve(MINILM).folder).save_pretrained(folder)
        return folder

    return save


def test_minilm_is_transformers_minilm(minilm: Backbone) -> None:
    folder = resolve(MINILM).folder
    plain = tf.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    inputs = minilm.tokenizer(["a cat sat", "rain"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = plain(**inputs).last_hidden_state
        found = minilm.hidden_states(inputs["input_ids"], inputs["attention_mask"])
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    assert (minilm.family, minilm.hidden_size, minilm.id) == ("encoder", 384, "minilm")
    assert minilm.sites.layers == {"": 6}
    assert minilm.tokenizer.pad_token == "[PAD]"


def test_a_backbone_is_frozen_and_stays_in_eval_mode(minilm: Backbone) -> None:
    assert not any(p.requires_grad for p in minilm.parameters())
    minilm.train()
    torch.nn.Sequential(minilm).train()
    assert not any(m.training for m in minilm.modules())


def test_no_pooler_is_loaded(minilm: Backbone) -> None:
    assert minilm.model.pooler is None


def test_checksum_sees_one_changed_weight(minilm: Backbone) -> None:
    before = minilm.checksum()
    weight = minilm.model.encoder.layer[3].attention.self.query.weight
    old = weight[5, 7].item()
    with torch.no_grad():
        weight[5, 7] += 1e-3
        changed = minilm.checksum()
        weight[5, 7] = old
    assert changed != before
    assert minilm.checksum() == before


def test_loading_is_quick_and_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    load_backbone(resolve(MINILM), dtype="bfloat16")  # imports, and hashes the files
    start = time.process_time()
    load_backbone(resolve(MINILM), dtype="bfloat16")
    assert time.process_time() - start < 1.5


def test_nothing_is_printed_while_loading(capfd: pytest.CaptureFixture[str]) -> None:
    load_backbone(resolve(MINILM), dtype="bfloat16")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["domain-lm-7m", "lm-tiny1m", "lm-stories260k"])
def test_real_decoders(shared: Path, name: str) -> None:
    backbone = load(shared / "models" / name)
    assert backbone.family == "decoder"
    inputs = backbone.tokenizer(["Once upon a time", "The"], padding=True, return_tensors="pt")
    plain = tf.AutoModelForCausalLM.from_pretrained(
        shared / "models" / name, dtype=torch.float32, attn_implementation="eager"
    )
    mask = inputs["attention_mask"]
    with torch.inference_mode():
        expected = plain(input_ids=inputs["input_ids"], attention_mask=mask).logits
        found = backbone.logits(input_ids=inputs["input_ids"], attention_mask=mask)
        hidden = backbone.hidden_states(inputs["input_ids"], mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)
    assert hidden.shape == (*mask.shape, backbone.hidden_size)


@pytest.mark.parametrize("name", ["domain-lm-7m", "lm-tiny1m", "lm-stories260k"])
def test_a_padding_token_never_changes_the_vocabulary(shared: Path, name: str) -> None:
    folder = shared / "models" / name
    plain, ours = tf.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert len(ours) == len(plain)
    assert ours.pad_token_id is not None
    assert ours.pad_token_id < load(folder).model.config.vocab_size
    if plain.pad_token_id is not None:
        assert ours.pad_token_id == plain.pad_token_id


def test_eos_pads_where_there_is_no_padding_token(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "word": 2}, unk_token="word"))
    for tokens, expected in [({"eos_token": "</s>", "bos_token": "<s>"}, 1), ({}, 0)]:
        tf.PreTrainedTokenizerFast(tokenizer_object=inner, **tokens).save_pretrained(tmp_path)
        tokenizer = load_tokenizer(tmp_path)
        assert (tokenizer.pad_token_id, len(tokenizer)) == (expected, 3)
        # A padding token that was added to the tokenizer, but never to the model.
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.save_pretrained(tmp_path)
        assert load_tokenizer(tmp_path).pad_token_id == 3
        assert load_tokenizer(tmp_path, 3).pad_token_id == expected


@pytest.mark.parametrize(
    ("name", "architecture", "family", "head"),
    [
        ("bert", "BertForMaskedLM", "encoder", False),
        ("bert", "BertModel", "encoder", False),
        ("modernbert", "ModernBertForMaskedLM", "encoder", False),
        ("llama", "LlamaForCausalLM", "decoder", True),
        ("gpt2", "GPT2LMHeadModel", "decoder", True),
        ("t5", "T5ForConditionalGeneration", "encoder-decoder", True),
        ("bart", "BartForConditionalGeneration", "encoder-decoder", True),
    ],
)
def test_family_follows_the_architecture(
    saved: Any, name: str, architecture: str, family: str, head: bool
) -> None:
    folder = saved(name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    backbone = load(folder)
    assert backbone.family == family
    assert ("head" in backbone.sites) == head


def test_a_decoder_without_head(tmp_path: Path, saved: Any) -> None:
    folder = saved("llama")
    body = tmp_path / "body"
    load(folder).model.model.save_pretrained(body)
    tf.AutoTokenizer.from_pretrained(folder).save_pretrained(body)
    backbone = load(body)
    assert backbone.family == "decoder"
    assert backbone.sites["layer.0.attn.q"].module == "layers.0.self_attn.q_proj"
    with pytest.raises(UserError, match="without a language model head"):
        backbone.logits(input_ids=torch.ones(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
def test_hidden_states_are_what_transformers_reports(family: str) -> None:
    backbone = tiny(family)
    inputs = batch(backbone)
    inputs = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    model = backbone.model.get_encoder() if family == "t5" else backbone.model
    with torch.inference_mode():
        expected = model(**inputs, output_hidden_states=True).hidden_states[-1]
        found = backbone.hidden_states(**inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real])
    assert answers(backbone, batch(backbone)) is not None


def test_attention_of_its_own_keeps_its_implementation(saved: Any) -> None:
    """Gemma 2 caps its scores, which SDPA cannot: its port is closed, its numbers stay right."""
    folder = saved("gemma2")
    backbone = load(folder)
    assert backbone.model.config._attn_implementation == "eager"
    assert load(saved("llama")).model.config._attn_implementation == "cfm_sdpa"


def test_missing_tensors_are_named(saved: Any) -> None:
    folder = saved("llama")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors \(first 'model\.layers\.1\.mlp\.up_proj"):
        load(folder)


def test_tensors_of_another_shape_are_refused(saved: Any) -> None:
    folder = saved("bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(UserError, match="cannot load the backbone 'bert'"):
        load(folder)


def test_unknown_models_and_code_of_their_own_are_refused(saved: Any) -> None:
    folder = saved("bert")
    config = json.loads((folder / "config.json").read_text())
    mapping = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    own = {**config, "model_type": "never-heard-of", "auto_map": mapping}
    (folder / "config.json").write_text(json.dumps(own))
    (folder / "evil.py").write_text("raise SystemExit('code of a model was run')")
    with pytest.raises(UserError, match="cannot read the config"):
        load(folder)


def test_a_vision_model_is_no_backbone_yet(saved: Any) -> None:
    folder = saved("bert")
    tf.ResNetConfig().save_pretrained(folder)
    with pytest.raises(UserError):
        load(folder)


def test_no_tokenizer(saved: Any) -> None:
    folder = saved("bert")
    for path in [*folder.glob("tok*"), *folder.glob("vocab*"), *folder.glob("special*")]:
        path.unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        load(folder)


def test_unknown_dtype() -> None:
    with pytest.raises(UserError, match=r"dtype=half.*use auto, float32"):
        load_backbone(resolve(MINILM), dtype="half")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_of_the_weights(dtype: str) -> None:
    backbone = load_backbone(resolve(MINILM), dtype=dtype)
    assert backbone.dtype == getattr(torch, dtype)
    assert {p.dtype for p in backbone.parameters()} == {backbone.dtype}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512f\n", set()),
        ("flags\t\t: fpu avx512_bf16 avx512f\n", {"avx512_bf16"}),
        ("flags : amx_bf16 amx_tile avx512_bf16\n", {"amx_bf16", "avx512_bf16"}),
        ("processor: 0\nFeatures\t: fp asimd bf16 i8mm\n", {"bf16"}),
        ("model name : bf16 in a name\n", set()),
        ("", set()),
    ],
)
def test_native_bfloat16_is_read_off_the_processor(
    tmp_path: Path, text: str, expected: set[str]
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_bfloat16_flags(tmp_path / "cpuinfo") == expected
    assert cpu_bfloat16_flags(tmp_path / "absent") == set()


def test_auto_is_the_native_dtype() -> None:
    flags = cpu_bfloat16_flags()
    assert native_dtype() == (torch.bfloat16 if flags else torch.float32)
    assert load_backbone(resolve(MINILM)).dtype == native_dtype("cpu")
    assert native_dtype("meta") == torch.float32
