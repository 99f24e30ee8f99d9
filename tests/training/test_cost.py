"""Cost: N by hand, and the floating-point operations of a step as PyTorch counts them."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from cfm_train.backbone.load import Backbone, load_backbone
from cfm_train.backbone.spec import resolve
from cfm_train.training.cost import matmul_parameters, peak_flops, peak_memory
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


@pytest.mark.parametrize("family", list(BY_HAND))
def test_matmul_parameters(family: str) -> None:
    assert HIDDEN == 32
    assert matmul_parameters(tiny(family)) == LAYERS * BY_HAND[family]


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
    return counter.get_total_flops() / ids.numel() / matmul_parameters(backbone)


def test_what_lies_below_the_lowest_brick_is_out_of_the_graph(deep: Backbone) -> None:
    """2N forward and, for gradients, 2N times the share of the layers above the lowest brick."""
    assert flops(deep, None) == pytest.approx(4.0, abs=0.25)
    assert flops(deep, [-2, -1]) == pytest.approx(2 + 2 * 2 / DEPTH, abs=0.2)
    assert flops(deep, [-1]) == pytest.approx(2 + 2 * 1 / DEPTH, abs=0.2)
    assert flops(deep, [0]) == pytest.approx(4.0, abs=0.3)


def test_gradient_checkpointing_does_not_bring_it_back(deep: Backbone) -> None:
    """Only the layers above are computed again, once the input gradients that transformers turns on
    with checkpointing (reentrant checkpointing needed them) are off again."""
    plain = flops(deep, [-2, -1])
    with checkpointing(deep) as layers:
        assert layers == DEPTH
        deep.model.disable_input_require_grads()
        again = flops(deep, [-2, -1])
    assert again - plain == pytest.approx(2 * 2 / DEPTH, abs=0.15)
