"""Tiny whole models to merge, and the recipe that merges them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cfm_train.launch.job import prepare
from tests.backbones import folder

Tensors = dict[str, Tensor]
HEAD = "lm_head.weight"


def write(path: Path, tensors: Tensors, family: str = "llama", shards: int = 1) -> Path:
    """A model folder with these tensors, and the config and tokenizer of a tiny one."""
    path.mkdir()
    for file in folder(family).iterdir():
        if file.suffix == ".json":
            shutil.copy(file, path / file.name)
    names = sorted(tensors, reverse=shards > 1)
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    weight_map = {}
    for number in range(shards):
        file_name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, path / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def drawn(number: int, dtype: torch.dtype = torch.bfloat16, family: str = "llama") -> Tensors:
    """The tensors of model ``number``; 0 is the base."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, value in sorted(load_file(folder(family) / "model.safetensors").items()):
        for _ in range(number + 1):
            noise = torch.randn(value.shape, generator=generator)
        generator.manual_seed(generator.initial_seed() + 1)
        found[name] = (value + (0.05 * noise if number else 0)).to(dtype)
    return found


def configure(path: Path, **changes: Any) -> None:
    """Changes keys of a model's config."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def arguments(where: Path, inputs: Sequence[Path], base: Path | None, *more: str) -> list[str]:
    return [
        "recipe=merge/models",
        f"models=[{','.join(map(str, inputs))}]",
        *([] if base is None else [f"base={base}"]),
        f"out={where / 'out'}",
        f"outputs={where / 'outputs'}",
        f"library={where / 'library'}",
        "tracking=disabled",
        *more,
    ]


def merge(where: Path, inputs: Sequence[Path], base: Path | None, *more: str) -> Tensors:
    """Runs the recipe in a folder of its own and returns the new tensors."""
    where.mkdir(parents=True, exist_ok=True)
    record = prepare(arguments(where, inputs, base, *more)).start()
    assert all(check["passed"] for check in record["checks"].values())
    return tensors_of(where / "out")


def tensors_of(path: Path) -> Tensors:
    found: Tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found
