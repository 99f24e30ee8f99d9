"""Every tuner of ``conf/brick`` that runs through PEFT, in a size that fits the tiny backbones."""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.kinds import make_brick
from cfm_train.bricks.peft import targets, whole_sites
from cfm_train.bricks.peft_modules import TASK_TYPES
from cfm_train.config.catalogue import groups
from cfm_train.config.compose import option

#: Blocks and ranks that fit widths of 32 and 48.
SMALL: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 6, "target_r": 4},
    "adamss": {"r": 8, "num_subspaces": 2},
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 40},
    "oft": {"oft_block_size": 8},
    "psoft": {"r": 4},
    "pvera": {"r": 8},
    "randlora": {"r": 4},
    "road": {"group_size": 8},
    "unilora": {"theta_d_length": 64},
    "vblora": {"num_vectors": 8, "vector_length": 8},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 40},
} | {name: {"r": 4} for name in ("deft", "delora", "glora", "gralora", "hira", "hra")}
SMALL |= {name: {"r": 4} for name in ("loha", "lokr", "miss", "peanut", "shira")}
SMALL["p_tuning"] = {"num_virtual_tokens": 3}


@functools.cache
def tuners() -> tuple[str, ...]:
    """The options of ``conf/brick`` whose kind is ``peft``."""
    return tuple(name for name in groups()["brick"] if section(name)["kind"] == "peft")


@functools.cache
def section(name: str) -> dict[str, Any]:
    """A brick section as a run composes it."""
    return option("brick", name)


def small(name: str) -> dict[str, Any]:
    """The section of a tuner with a feed-forward site beside attention's, in a small size."""
    own = section(name)
    made = {**own, "options": {**own["options"], **SMALL.get(name, {})}}
    if own["sites"] == ["attn.q", "attn.v"]:
        made["sites"] = ["attn.q", "attn.v", "ffn.down"]
    return made


def make(name: str, backbone: Backbone) -> Any:
    """A new brick of a tuner, always with the same random start."""
    torch.manual_seed(0)
    return make_brick(small(name)).build(backbone)


def peft_config(name: str, backbone: Backbone, **more: Any) -> Any:
    """PEFT's own config for the same tuner on the same modules."""
    chosen = small(name)
    values = {k: v for k, v in chosen["options"].items() if v is not None} | more
    values["task_type"] = TASK_TYPES[backbone.family]
    if name == "p_tuning":
        values |= {"encoder_hidden_size": 32, "num_transformer_submodules": 1}
    else:
        values["target_modules"] = targets(
            backbone, whole_sites(backbone, chosen["sites"], None, name)
        )
    if name == "adalora":
        values["total_step"] = 10
    return PEFT_TYPE_TO_CONFIG_MAPPING[name.upper()](**values)
