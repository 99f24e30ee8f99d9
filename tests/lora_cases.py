"""The variants of LoRA that the tests go through, and how to make each."""

from __future__ import annotations

from typing import Any

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.lora import LoRA
from tests import brick_laws as laws

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "lora_bias": {"bias": "lora_bias"},
    "lora_only": {"bias": "lora_only"},
    "dora_lora_only": {"dora": True, "bias": "lora_only"},
}


def lora(backbone: Backbone, **changed: Any) -> LoRA:
    """A new brick; attention's q and v and a feed-forward site unless told otherwise."""
    hyper: dict[str, Any] = {
        "rank": 4,
        "alpha": 7,
        "dropout": 0.0,
        "sites": ["attn.q", "attn.v", "ffn.down"],
        "layers": None,
        "rslora": False,
        "dora": False,
        "bias": "none",
    }
    return LoRA(**hyper | changed).build(backbone)


def maker(variant: str, **changed: Any) -> laws.Make:
    return lambda backbone: lora(backbone, **VARIANTS[variant] | changed)


def restored(files: dict[str, bytes], backbone: Backbone) -> LoRA:
    return LoRA.restore({}, files, backbone).eval()
