"""LoRA bricks on disk: PEFT's format, both ways, value for value.

PEFT names modules, we name sites. The two differ where an architecture fuses several sites into one
module (GPT-2's c_attn is q, k and v): bricks on slices of one module are written as one adapter of the
sum of their ranks, whose B is zero outside each slice's rows; `interface["slices"]` lets us take it
apart again, and PEFT computes the same output.

Nothing is ignored: an adapter feature that we do not compute stops the load with its name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from cfm_train.backbone.sites import Site
from cfm_train.backbone.slots import row_index
from cfm_train.bricks.bank import bias_of
from cfm_train.bricks.brick import json_bytes, parameter_name
from cfm_train.errors import UserError

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.bricks.lora import LoRA

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

#: Keys of PEFT's LoraConfig that we compute, or that decide nothing once an adapter is trained.
UNDERSTOOD = frozenset(
    "peft_type r lora_alpha lora_dropout use_rslora use_dora bias lora_bias rank_pattern alpha_pattern "
    "fan_in_fan_out target_modules exclude_modules layers_to_transform layers_pattern task_type "
    "base_model_name_or_path revision inference_mode peft_version auto_mapping megatron_core "
    "qalora_group_size runtime_config ephemeral_gpu_offload init_lora_weights".split()
)
#: Initialisations that leave the backbone's weights alone; others (PiSSA, OLoRA, …) rewrite them.
HARMLESS_INIT = (True, False, None, "gaussian", "orthogonal", "eva")


def to_peft(brick: LoRA) -> dict[str, bytes]:
    """The two files PEFT reads, for a brick of any mix of ranks, alphas and sliced sites."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    rslora = brick.hyper["rslora"]
    for module, names in slices_by_module(brick).items():
        A, B, magnitude, bias, scale = _module_factors(brick, names)
        rank = A.shape[0]
        ranks[module] = rank
        alphas[module] = scale * (math.sqrt(rank) if rslora else rank)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = A
        tensors[f"{PREFIX}{module}.lora_B.weight"] = B
        if magnitude is not None:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = magnitude
        if bias is not None:
            tensors[f"{PREFIX}{module}.lora_B.bias"] = bias
    rank = max(ranks.values(), key=list(ranks.values()).count)
    alpha = max(alphas.values(), key=list(alphas.values()).count)
    config = {
        "peft_type": "LORA",
        "task_type": brick.task_type,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": brick.hyper["dropout"],
        "target_modules": sorted(ranks),
        "use_rslora": rslora,
        "use_dora": brick.hyper["dora"],
        "lora_bias": len(brick.bias) > 0,
        "bias": "none",
        "fan_in_fan_out": any(site.transposed for site in brick.built_for.values()),
        "rank_pattern": {f"^{re.escape(m)}": r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(m)}": _plain(a) for m, a in alphas.items() if a != alpha},
    }
    tensors = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
    return {CONFIG_FILE: json_bytes(config), TENSOR_FILE: save(tensors)}


def slices_by_module(brick: LoRA) -> dict[str, list[str]]:
    """The brick's sites by the module that they lie in."""
    modules: dict[str, list[str]] = {}
    for name in brick.site_names:
        modules.setdefault(brick.built_for[name].module, []).append(name)
    return modules


def _plain(value: float) -> float | int:
    """16.0 as 16, so that files look as PEFT's do; the nearest short number within rounding."""
    rounded = round(value, 9)
    return int(rounded) if rounded == int(rounded) else rounded


def _module_factors(
    brick: LoRA, names: list[str]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]:
    """A, B, magnitude, bias and scale of a module: of one site, or of several slices in blocks."""

    def factors(name: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        key = parameter_name(name)
        magnitude = brick.magnitude[key] if key in brick.magnitude else None
        bias = brick.bias[key] if key in brick.bias else None
        return brick.lora_A[key], brick.lora_B[key], magnitude, bias

    first = brick.built_for[names[0]]
    if len(names) == 1 and first.rows is None:
        return (*factors(names[0]), brick.scales[names[0]])
    if brick.hyper["dora"]:
        raise UserError(
            f"DoRA on '{names[0]}' cannot be written for PEFT: the site is a part of the fused module "
            f"'{first.module}'; choose the whole module as the site."
        )
    scale = brick.scales[names[0]]
    blocks_A, blocks_B = [], []
    for name in names:
        A, B, _, _ = factors(name)
        site = brick.built_for[name]
        block = torch.zeros(brick.widths[site.module], B.shape[1], device=B.device)
        rows = torch.arange(len(block)) if site.rows is None else row_index(site, B.device)
        # Ranks may differ: one scale for the module, the rest goes into B.
        block[rows] = B.detach() * (brick.scales[name] / scale)
        blocks_A.append(A.detach())
        blocks_B.append(block)
    return torch.cat(blocks_A), torch.cat(blocks_B, dim=1), None, None, scale


def from_peft(
    cls: type[LoRA], interface: Mapping[str, Any], files: Mapping[str, bytes], backbone: Backbone
) -> LoRA:
    """A brick from PEFT's two files.

    Raises:
        UserError: a feature we do not compute, a tensor without a site, or a shape that differs.
    """
    config = json.loads(files[CONFIG_FILE])
    check_config(config)
    hyper = interface.get("hyper") or {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout", 0.0),
        "sites": [],
        "layers": None,
        "rslora": bool(config.get("use_rslora")),
        "dora": bool(config.get("use_dora")),
    }
    brick = cls(**hyper)
    brick.know(backbone)
    for module, parts in _by_module(load(files[TENSOR_FILE])).items():
        _add_module(brick, module, parts, config, interface.get("slices") or {}, backbone)
    return brick.to(backbone.device)


def check_config(config: Mapping[str, Any]) -> None:
    """Refuses what an adapter config asks for and we do not compute.

    Raises:
        UserError: naming the feature.
    """
    for key, value in config.items():
        if key not in UNDERSTOOD and value not in (None, False, {}, []):
            raise UserError(
                f"The adapter uses PEFT's '{key}' ({value!r}), which a lora brick does not compute: "
                "add it with --kind peft to run it through PEFT."
            )
    if config.get("init_lora_weights") not in HARMLESS_INIT:
        raise UserError(
            f"The adapter was initialised with '{config['init_lora_weights']}', which rewrites the "
            "backbone's own weights: convert it to a plain LoRA with PEFT first "
            "(save_pretrained with path_initial_model_for_weight_conversion)."
        )
    if config.get("bias") == "all":
        raise UserError(
            "The adapter trained every bias of its model (bias='all'): only 'none' and 'lora_only' "
            "are read; add it with --kind peft."
        )


def _by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors grouped by module path: ``{"…query": {"lora_A.weight": …}}``."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        match = re.fullmatch(
            r"(?:base_model\.model\.)?(.+?)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|"
            r"lora_magnitude_vector(?:\.weight)?|bias|base_layer\.bias)",
            name,
        )
        if match is None:
            raise UserError(f"The adapter holds the tensor '{name}', which is no part of a LoRA.")
        part = match[2].removesuffix(".weight") if "magnitude" in match[2] else match[2]
        modules.setdefault(match[1], {})[part.removeprefix("base_layer.")] = value
    return modules


def _pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's path."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def find_site(backbone: Backbone, module: str) -> Site:
    """The whole linear site of a module path, which may carry or lack a wrapper's prefix.

    PEFT names modules from the class that it wrapped: a ``BertForSequenceClassification`` puts
    ``bert.`` before what a ``BertModel`` calls ``encoder.layer.0…``.

    Raises:
        UserError: there is no such linear module.
    """
    for site in backbone.sites.values():
        own = site.module
        same = own == module or module.endswith(f".{own}") or own.endswith(f".{module}")
        if same and site.kind in ("linear", "conv1d") and site.rows is None:
            return site
    raise UserError(
        f"The adapter updates the module '{module}', which the backbone '{backbone.id}' does not have "
        "as a linear layer: it was trained on another model."
    )


def _add_module(
    brick: LoRA,
    module: str,
    parts: Mapping[str, Tensor],
    config: Mapping[str, Any],
    slices: Mapping[str, list[str]],
    backbone: Backbone,
) -> None:
    site = find_site(backbone, module)
    for name in ("lora_A.weight", "lora_B.weight"):
        if name not in parts:
            raise UserError(f"The adapter misses '{module}.{name}': the file is incomplete.")
    A, B = parts["lora_A.weight"], parts["lora_B.weight"]
    rank = A.shape[0]
    stated = _pattern_value(config.get("rank_pattern", {}), module, config["r"])
    if rank != stated:
        raise UserError(
            f"The adapter's config gives rank {stated} for '{module}', but its tensors have {rank}."
        )
    if A.shape[1] != site.in_features or B.shape != (site.out_features, rank):
        raise UserError(
            f"The adapter's '{module}' maps {A.shape[1]} to {B.shape[0]} features, but the "
            f"backbone's maps {site.in_features} to {site.out_features}."
        )
    alpha = _pattern_value(config.get("alpha_pattern", {}), module, config["lora_alpha"])
    bias = parts.get("lora_B.bias")
    if "bias" in parts:  # bias='lora_only': the trained bias replaces the backbone's
        own = bias_of(backbone.model.get_submodule(site.module), site)
        bias = parts["bias"].float() - (0 if own is None else own.float().cpu())
        bias = bias / (alpha / (math.sqrt(rank) if brick.hyper["rslora"] else rank))
    magnitude = parts.get("lora_magnitude_vector")
    if site.module not in slices:
        brick.add_site(site, A, B, alpha, magnitude, bias)
        return
    names = slices[site.module]
    share = rank // len(names)
    for i, name in enumerate(names):
        part = backbone.sites[name]
        block = slice(i * share, (i + 1) * share)
        rows = torch.arange(len(B)) if part.rows is None else row_index(part, B.device)
        own_alpha = alpha * (math.sqrt(share / rank) if brick.hyper["rslora"] else share / rank)
        brick.add_site(part, A[block], B[rows][:, block], own_alpha, None, None)
