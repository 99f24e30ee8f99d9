"""What PEFT saves of a model fits that model, on every architecture; what cannot fit is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from cfm_train.backbone.fits import check_fits
from cfm_train.backbone.spec import ResolvedBackbone, resolve
from cfm_train.errors import UserError
from cfm_train.library.gate import check_tensors
from cfm_train.library.tensorfile import TensorInfo
from tests.backbones import FAMILIES, LAYERS, folder, plain_model


def adapter(model: Any, out: Path, config: Any) -> dict[str, TensorInfo]:
    """The tensors of what PEFT saves."""
    get_peft_model(model, config).save_pretrained(out)
    return check_tensors(out / "adapter_model.safetensors")


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(r=3, target_modules="all-linear", **more)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapter_fits_the_model_that_it_was_made_on(name: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[name].auto.from_config(ARCHITECTURES[name].config())
    model.save_pretrained(tmp_path / "model")
    backbone = resolve({"path": str(tmp_path / "model")})
    check_fits(adapter(model, tmp_path / "adapter", lora()), backbone, "it")


@pytest.mark.parametrize("theirs", FAMILIES)
def test_one_of_another_family_is_refused(theirs: str, tmp_path: Path) -> None:
    """Both ways between every two families; an IA3 as well, which has no low-rank factors."""
    tensors = adapter(plain_model(theirs), tmp_path / "lora", lora())
    ia3 = IA3Config(target_modules="all-linear", feedforward_modules=[])
    scales = adapter(plain_model(theirs), tmp_path / "ia3", ia3)
    for family in FAMILIES:
        backbone = resolve({"path": str(folder(family))})
        for made in (tensors, scales):
            if family == theirs:
                check_fits(made, backbone, "it")
                continue
            with pytest.raises(UserError, match=r"it does not fit the backbone .* has none of its"):
                check_fits(made, backbone, "it")


def changed(family: str, out: Path, change: Any) -> ResolvedBackbone:
    """A tiny backbone whose tensors were changed."""
    shutil.copytree(folder(family), out)
    save_file(change(load_file(out / "model.safetensors")), out / "model.safetensors")
    return resolve({"path": str(out)})


def test_one_of_another_size_is_refused(tmp_path: Path) -> None:
    tensors = adapter(plain_model("llama"), tmp_path / "lora", lora())
    narrow = changed(
        "llama",
        tmp_path / "narrow",
        lambda held: {n: v[..., :-8].clone() if v.ndim == 2 else v for n, v in held.items()},
    )
    with pytest.raises(UserError, match=r"lora_A.weight' is \d+ wide, and layers\.0\.\S+ there"):
        check_fits(tensors, narrow, "it")
    shallow = changed(
        "llama",
        tmp_path / "shallow",
        lambda held: {n: v for n, v in held.items() if f"layers.{LAYERS - 1}." not in n},
    )
    with pytest.raises(UserError, match=rf"has no layer for its '.*layers\.{LAYERS - 1}\."):
        check_fits(tensors, shallow, "it")


def test_what_cannot_be_told_is_let_through(tmp_path: Path) -> None:
    """Packed weights, experts by another name, tensors outside of layers, another front."""
    tensors = adapter(plain_model("llama"), tmp_path / "lora", lora())
    packed = changed(
        "llama",
        tmp_path / "packed",
        lambda held: {n: torch.zeros(5, dtype=torch.uint8) for n in held},
    )
    check_fits(tensors, packed, "it")
    front = changed(
        "llama",
        tmp_path / "front",
        lambda held: {f"language_model.{n}": v for n, v in held.items()},
    )
    check_fits(tensors, front, "it")
    bert = resolve({"path": str(folder("bert"))})
    info = next(iter(tensors.values()))
    check_fits({"base_model.model.layers.0.mlp.experts.1.up.lora_A.weight": info}, bert, "it")
    check_fits({"base_model.model.lm_head.lora_A.weight": info, "prompt": info}, bert, "it")
