"""LoRA bricks written as PEFT adapters, value for value (`lora_reading.py` reads them).

PEFT names modules, we name sites. The two differ where an architecture fuses several sites into
one module (GPT-2's c_attn is q, k and v): bricks on slices of one module are written as one adapter
of the sum of their ranks, whose B is zero outside each slice's rows; `interface["slices"]` lets us
take it apart again, and PEFT computes the same output.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from cfm_train.bricks.brick import json_bytes, parameter_name
from cfm_train.bricks.peft_modules import PREFIX, rows_in
from cfm_train.library.peft_format import CONFIG_FILE, TENSOR_FILE

if TYPE_CHECKING:
    from cfm_train.bricks.lora import LoRA


@dataclass(frozen=True)
class _Adapter:
    """What PEFT keeps for one module."""

    A: Tensor  # [rank, in_features]
    B: Tensor  # [out_features, rank]
    alpha: float
    magnitude: Tensor | None  # [out_features]
    bias: Tensor | None  # [out_features]

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def to_peft(brick: LoRA) -> dict[str, bytes]:
    """The two files PEFT reads, for a brick of any mix of ranks, alphas and sliced sites."""
    hyper = brick.hyper
    adapters = {module: _adapter(brick, names) for module, names in sites_by_module(brick).items()}
    scaled_bias = hyper["bias"] == "lora_bias"
    tensors: dict[str, Tensor] = {}
    for module, adapter in adapters.items():
        stem = f"{PREFIX}{module}"
        tensors[f"{stem}.lora_A.weight"] = adapter.A
        tensors[f"{stem}.lora_B.weight"] = adapter.B
        if adapter.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = adapter.magnitude
        if adapter.bias is not None:
            tensors[f"{stem}.{'lora_B' if scaled_bias else 'base_layer'}.bias"] = adapter.bias
    rank = _commonest([adapter.rank for adapter in adapters.values()])
    alpha = _commonest([adapter.alpha for adapter in adapters.values()])
    config = {
        "peft_type": "LORA",
        "task_type": brick.task_type,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": hyper["dropout"],
        "target_modules": sorted(adapters),
        "use_rslora": hyper["rslora"],
        "use_dora": hyper["dora"],
        "lora_bias": scaled_bias,
        "bias": "lora_only" if hyper["bias"] == "lora_only" else "none",
        "fan_in_fan_out": any(site.transposed for site in brick.built_for.values()),
        "rank_pattern": {f"^{re.escape(m)}": a.rank for m, a in adapters.items() if a.rank != rank},
        "alpha_pattern": {
            f"^{re.escape(m)}": _plain(a.alpha) for m, a in adapters.items() if a.alpha != alpha
        },
    }
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    return {CONFIG_FILE: json_bytes(config), TENSOR_FILE: save(tensors)}


def sites_by_module(brick: LoRA) -> dict[str, list[str]]:
    """The brick's sites by the module that they lie in."""
    modules: dict[str, list[str]] = {}
    for name in brick.site_names:
        modules.setdefault(brick.built_for[name].module, []).append(name)
    return modules


def slices_on_disk(brick: LoRA) -> dict[str, dict[str, dict[str, float]]]:
    """Which sites share one adapter on disk: module → site → its rank and alpha, in file order."""

    def entry(name: str, scale: float) -> dict[str, float]:
        rank = len(brick.lora_A[parameter_name(name)])
        same = brick.scales[name] == scale
        return {
            "rank": rank,
            "alpha": _plain(brick.alphas[name] if same else _alpha(brick, scale, rank)),
        }

    return {
        module: {name: entry(name, brick.scales[names[0]]) for name in names}
        for module, names in sites_by_module(brick).items()
        if not _is_one(brick, names)
    }


def _is_one(brick: LoRA, names: list[str]) -> bool:
    """Whether a module is one site of the brick, whole."""
    return len(names) == 1 and brick.built_for[names[0]].rows is None


def _alpha(brick: LoRA, scale: float, rank: int) -> float:
    """The alpha with which PEFT scales an update of that rank by ``scale``."""
    return scale * (math.sqrt(rank) if brick.hyper["rslora"] else rank)


def _commonest(values: list[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _plain(value: float) -> float | int:
    """16.0 as 16, so that files look as PEFT's do; any other number to its last bit."""
    return int(value) if value == int(value) else value


def _adapter(brick: LoRA, names: list[str]) -> _Adapter:
    """One module's adapter: of one site as it is, of several slices in blocks."""

    def own(parameters: nn.ParameterDict, name: str) -> Any:
        value = parameters.get(parameter_name(name), None)
        return None if value is None else value.detach().cpu()

    parts = (brick.lora_A, brick.lora_B, brick.magnitude, brick.bias)
    factors = {name: [own(parameters, name) for parameters in parts] for name in names}
    if _is_one(brick, names):
        A, B, magnitude, bias = factors[names[0]]
        return _Adapter(A, B, brick.alphas[names[0]], magnitude, bias)
    first = brick.built_for[names[0]]
    whole, scale = brick.whole[first.module], brick.scales[names[0]]
    magnitude, bias = _clone(whole.magnitude), _clone(whole.bias)
    blocks_A, blocks_B = [], []
    for name, (A, B, own_magnitude, own_bias) in factors.items():
        rows = rows_in(brick.built_for[name], whole.width)
        # Scales may differ: PEFT has one for the module, the rest goes into B.
        ratio = brick.scales[name] / scale
        block = torch.zeros(whole.width, B.shape[1])
        block[rows] = B if ratio == 1 else B * ratio
        blocks_A.append(A)
        blocks_B.append(block)
        if own_magnitude is not None and magnitude is not None:
            magnitude[rows] = own_magnitude
        if own_bias is not None and brick.hyper["bias"] == "lora_bias":
            bias = torch.zeros(whole.width) if bias is None else bias
            bias[rows] += own_bias * ratio
        elif own_bias is not None and bias is not None:
            bias[rows] = own_bias
    stacked = torch.cat(blocks_A)
    alpha = brick.alphas[names[0]] if len(names) == 1 else _alpha(brick, scale, len(stacked))
    return _Adapter(stacked, torch.cat(blocks_B, dim=1), alpha, magnitude, bias)


def _clone(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().cpu().clone()
