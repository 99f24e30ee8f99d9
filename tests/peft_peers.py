"""PEFT as the oracle: adapters that PEFT trained for us, and ours as PEFT runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from cfm_train.bricks.brick import Brick
from tests.backbones import answers, plain_model, randomise

FILES = ("adapter_config.json", "adapter_model.safetensors")


def trained_by_peft(family: str, config: Any) -> Any:
    """A PEFT model on a tiny backbone, its trainable parameters random."""
    model = peft.get_peft_model(plain_model(family), config)
    randomise(torch.nn.ParameterList(p for p in model.parameters() if p.requires_grad))
    return model.eval()


def files_of(model: Any, folder: Path) -> dict[str, bytes]:
    """The two files of an adapter, as PEFT saves them."""
    # An adapter of the LM head would bring a copy of the head's own weight.
    model.save_pretrained(folder, save_embedding_layers=False)
    return {name: (folder / name).read_bytes() for name in FILES}


def in_peft(brick: Brick, family: str, folder: Path) -> Any:
    """A brick of ours, exported and loaded by PEFT."""
    folder.mkdir()
    for name, content in brick.body_files().items():
        (folder / name).write_bytes(content)
    return peft.PeftModel.from_pretrained(plain_model(family), folder).eval()


@torch.no_grad()
def values(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The answers of a model, without gradients."""
    return answers(model, inputs)
