"""Cost: N by hand, and the floating-point operations of a step as PyTorch counts them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from cfm_train.backbone.load import Backbone, load_backbone
from cfm_train.backbone.sites import find_sites
from cfm_train.backbone.spec import resolve
from cfm_train.training.cost import Work, peak_flops, peak_memory, work_of
from tests.backbones import HIDDEN, LAYERS, folder, section, tiny
from tests.brick_laws import checkpointing
from tests.training.runs import new_brick

DEPTH = 8

#: Weights of one layer's linear maps, by hand: width 32, feed-forward 48 (GPT-2: 4 x 32).
BY_HAND = {
    "bert": 4 * 32 * 32 + 2 * 32 * 48,
    "llama": 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48,  # two of four heads for keys and values
    "gpt2": 4 * 32 * 32 + 2 * 32 * 128,
    "t5": (4 * 32 * 32 + 2 * 32 * 48) + (8 * 32 * 32 + 2 * 32 * 48),  # one of either stack
}


#: T5's cross-attention: keys and values of a layer, computed from the encoder's tokens.
CROSSING = 2 * 32 * 32


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_work_of_one_stack_by_hand(family: str) -> None:
    """2N forward; 2N more for the layers from the lowest brick on; a head alone has none."""
    assert HIDDEN == 32
    backbone, layer = tiny(family), BY_HAND[family]
    assert work_of(backbone, []) == Work(2 * LAYERS * layer, 0, 0)
    assert work_of(backbone, ["layer.1.attn.v", "layer.0.attn.q"]).source == 4 * LAYERS * layer
    assert work_of(backbone, ["layer.1.ffn.up"]).source == (2 * LAYERS + 2) * layer
    assert work_of(backbone, ["embed"]).source == 4 * LAYERS * layer
    if family != "bert":
        assert work_of(backbone, ["norm"]).source == 2 * LAYERS * layer


def test_work_of_two_stacks_by_hand() -> None:
    """Each stack on its own tokens; what the encoder learns comes back through the decoder."""
    t5 = tiny("t5")
    source, crossing, target = (
        LAYERS * one for one in (BY_HAND["bert"], CROSSING, BY_HAND["t5"] - BY_HAND["bert"])
    )
    target -= crossing
    assert work_of(t5, []) == Work(2 * source, 2 * crossing, 2 * target)
    assert work_of(t5, ["decoder.layer.0.attn.q"]) == Work(2 * source, 2 * crossing, 4 * target)
    assert work_of(t5, ["decoder.layer.1.attn.q"]).target == 3 * target
    half = Work(3 * source, 4 * crossing, 4 * target)
    assert work_of(t5, ["encoder.layer.1.attn.q"]) == half
    assert half.of(10, 3) == 10 * (half.source + half.crossing) + 3 * half.target
    assert half.of(10, 0) == 10 * half.source  # a head reads the encoder: no decoder runs


def counted(model: Any, **inputs: Any) -> int:
    """Floating-point operations of all matrix products by a weight, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(**inputs)
    products = counter.get_flop_counts()["Global"]
    return sum(n for op, n in products.items() if str(op) in ("aten.mm", "aten.addmm"))


@pytest.mark.parametrize("family", list(BY_HAND))
def test_forward_work_is_what_pytorch_counts(family: str) -> None:
    backbone = tiny(family)
    ids = torch.arange(3, 13).reshape(2, 5)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected, targets = work_of(backbone, []), 0
    if family == "t5":
        inputs["decoder_input_ids"] = ids[:, :3]
        targets = 6
    heads = {"bert": 0, "t5": targets}.get(family, 10) * 2 * 32 * 64  # the language model's head
    assert counted(backbone.model, **inputs) == expected.of(10, targets) + heads


SMALL = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}


def test_layers_that_run_again_and_experts_that_do_not_run() -> None:
    """ALBERT's one layer runs three times; Mixtral takes two of four experts."""
    shared = transformers.AlbertConfig(**SMALL, num_hidden_layers=3, embedding_size=32)
    mixture = transformers.MixtralConfig(
        **SMALL, num_hidden_layers=2, num_key_value_heads=4, num_local_experts=4
    )
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    ids = torch.arange(3, 13).reshape(2, 5)
    layer = 4 * 32 * 32
    for config, parameters, around in (
        (shared, 3 * (layer + 2 * 32 * 48), 32 * 32),  # what widens the embedding
        (mixture, 2 * (layer + 2 * 3 * 32 * 48), 2 * 32 * 4),  # the routers
    ):
        model = transformers.AutoModel.from_config(config, **eager).eval()
        if config is shared:
            model.pooler = None
        backbone: Any = SimpleNamespace(model=model, sites=find_sites(model))
        assert work_of(backbone, []).source == 2 * parameters
        assert counted(model, input_ids=ids) == 2 * (parameters + around) * 10


def test_what_the_machine_does() -> None:
    assert peak_flops(torch.float32, torch.device("cpu"), size=256) > 1e8
    assert 2**24 < peak_memory() < 2**42


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A Llama of eight layers, wide enough that linear maps are nearly all of its work."""
    path = tmp_path_factory.mktemp("deep")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    for file in folder("llama").glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    return load_backbone(resolve({**section("llama"), "path": str(path)}), dtype="float32")


def flops(backbone: Backbone, layers: list[int] | None) -> float:
    """Floating-point operations of forward and backward, as multiples of N for each token."""
    brick = new_brick(backbone, {}, "lora", rank=2, layers=layers).train()
    ids = torch.arange(3, 35).repeat(4, 1)
    with backbone.slots.plugged([brick]), FlopCounterMode(display=False) as counter:
        backbone.logits(input_ids=ids, attention_mask=torch.ones_like(ids)).mean().backward()
    return counter.get_total_flops() / ids.numel() / (work_of(backbone, []).source / 2)


def test_what_lies_below_the_lowest_brick_is_out_of_the_graph(deep: Backbone) -> None:
    """2N forward and, for gradients, 2N times the share of the layers above the lowest brick."""
    assert flops(deep, None) == pytest.approx(4.0, abs=0.25)
    assert flops(deep, [-2, -1]) == pytest.approx(2 + 2 * 2 / DEPTH, abs=0.2)
    assert flops(deep, [-1]) == pytest.approx(2 + 2 * 1 / DEPTH, abs=0.2)
    assert flops(deep, [0]) == pytest.approx(4.0, abs=0.3)
    whole = work_of(deep, []).source / 2
    for layer in range(DEPTH):
        stated = work_of(deep, [f"layer.{layer}.attn.q"]).source / whole
        assert flops(deep, [layer]) == pytest.approx(stated, abs=0.25), layer


def test_gradient_checkpointing_does_not_bring_it_back(deep: Backbone) -> None:
    """Only the layers above are computed again, once the input gradients that transformers turns on
    with checkpointing (reentrant checkpointing needed them) are off again."""
    plain = flops(deep, [-2, -1])
    with checkpointing(deep) as layers:
        assert layers == DEPTH
        deep.model.disable_input_require_grads()
        again = flops(deep, [-2, -1])
    assert again - plain == pytest.approx(2 * 2 / DEPTH, abs=0.15)


def test_pretraining_has_gradients_of_weights_too() -> None:
    """6N FLOP a token (Kaplan et al. 2020, arXiv 2001.08361) where a brick below all layers has
    4N."""
    backbone = tiny("llama")
    names = list(backbone.sites)
    assert work_of(backbone, names, weights=True).source == 1.5 * work_of(backbone, names).source
