"""PEFT's LoRA adapters read as bricks: the other way round than `lora_files.py`.

Nothing is ignored: an adapter feature that we do not compute stops the load with its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors.torch import load
from torch import Tensor

from cfm_train.bricks.peft_modules import TASK_TYPES, find_site, pattern_value, rows_in
from cfm_train.errors import UserError
from cfm_train.library.peft_checks import check_computed
from cfm_train.library.peft_format import CONFIG_FILE, TENSOR_FILE, aside_tensors

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.bricks.lora import LoRA

Kind = TypeVar("Kind", bound="LoRA")

_PART = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias"
    r"|lora_magnitude_vector|base_layer\.bias)(?P<old>(?<=vector)\.weight)?"
)
#: An older PEFT left the trained bias of a module under the module's own name.
_OLD_BIAS = re.compile(r"(?:base_model\.model\.)?(?P<module>.+?)\.bias")


def from_peft(
    brick_class: type[Kind],
    interface: Mapping[str, Any],
    files: Mapping[str, bytes],
    backbone: Backbone,
) -> Kind:
    """A brick from PEFT's two files.

    Raises:
        UserError: a feature we do not compute, a tensor without a site, or a shape that differs.
    """
    config = json.loads(files[CONFIG_FILE])
    check_computed("lora", config, f"for '{backbone.id}'")
    brick = brick_class(**(interface.get("hyper") or _hyper(config)))
    brick.task_type = TASK_TYPES[backbone.family]
    slices = interface.get("slices") or {}
    for module, parts in _by_module(load(files[TENSOR_FILE]), config).items():
        _add_module(brick, module, parts, config, slices, backbone)
    # Files are ordered by name, bricks by the backbone.
    brick.site_names = tuple(name for name in backbone.sites if name in brick.built_for)
    return brick.to(backbone.device)


def _hyper(config: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of an adapter that PEFT trained."""
    bias = "lora_bias" if config.get("lora_bias") else config.get("bias") or "none"
    return {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout") or 0.0,
        "sites": [],
        "layers": None,
        "rslora": bool(config.get("use_rslora")),
        "dora": bool(config.get("use_dora")),
        "bias": bias,
    }


def _by_module(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """Tensors grouped by module path: ``{"…query": {"lora_A.weight": …}}``."""
    aside = set(aside_tensors(config, tensors))
    modules: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name in aside:
            continue
        match = _PART.fullmatch(name)
        old = None if match else _OLD_BIAS.fullmatch(name)
        if match is not None:
            modules.setdefault(match["module"], {})[match["part"]] = value
        elif old is not None:
            modules.setdefault(old["module"], {})["base_layer.bias"] = value
        else:
            raise UserError(f"The adapter holds the tensor '{name}', which is no part of a LoRA.")
    return modules


def _check_parts(brick: LoRA, module: str, parts: Mapping[str, Tensor]) -> None:
    """What the config promises is there, and nothing that it does not name.

    Raises:
        UserError: naming the tensor.
    """
    hyper = brick.hyper
    needed = {"lora_A.weight", "lora_B.weight"}
    if hyper["dora"]:
        needed.add("lora_magnitude_vector")
    if hyper["bias"] == "lora_bias":
        needed.add("lora_B.bias")
    # Of `lora_only`, modules without a bias have none to train.
    allowed = needed | ({"base_layer.bias"} if hyper["bias"] == "lora_only" else set())
    if missing := sorted(needed - parts.keys()):
        raise UserError(f"The adapter misses '{module}.{missing[0]}': the file is incomplete.")
    if surplus := sorted(parts.keys() - allowed):
        raise UserError(
            f"The adapter holds '{module}.{surplus[0]}', which its config does not speak of: "
            "config and tensors belong to different adapters."
        )


def _add_module(
    brick: LoRA,
    module: str,
    parts: Mapping[str, Tensor],
    config: Mapping[str, Any],
    slices: Mapping[str, Mapping[str, Mapping[str, float]]],
    backbone: Backbone,
) -> None:
    site = find_site(backbone, module)
    _check_parts(brick, module, parts)
    A, B = parts["lora_A.weight"], parts["lora_B.weight"]
    rank = A.shape[0]
    stated = pattern_value(config.get("rank_pattern"), module, config["r"])
    if rank != stated:
        raise UserError(
            f"The adapter's config gives rank {stated} for '{module}', but its tensors have {rank}."
        )
    magnitude = parts.get("lora_magnitude_vector")
    bias = parts.get("lora_B.bias", parts.get("base_layer.bias"))
    widths = {len(v) for v in (magnitude, bias) if v is not None} | {B.shape[0]}
    if A.shape[1] != site.in_features or B.shape[1] != rank or widths != {site.out_features}:
        raise UserError(
            f"The adapter's '{module}' maps {A.shape[1]} to {B.shape[0]} features, but the "
            f"backbone's maps {site.in_features} to {site.out_features}."
        )
    alpha = pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"])
    if site.module not in slices:
        brick.add_site(site, A, B, alpha, magnitude, bias)
        return
    start = 0
    for name, stated_part in slices[site.module].items():
        part = backbone.sites[name]
        rows = rows_in(part, len(B))
        block = slice(start, start + int(stated_part["rank"]))
        start = block.stop
        brick.add_site(
            part,
            A[block],
            B[rows][:, block],
            stated_part["alpha"],
            None if magnitude is None else magnitude[rows],
            None if bias is None else bias[rows],
        )
        brick.know(backbone, part)
