"""What our bricks compute of a PEFT adapter; anything else is refused by name, never passed over.

Refused are initialisations that rewrite the backbone (PiSSA and its kin), features that our kinds
do not compute, keys that the installed PEFT would pass over, tensors that belong to nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfm_train.errors import UserError, nearest
from cfm_train.library.peft_catalogue import config_keys

#: Our own kinds that read PEFT's format, by PEFT's name for them.
KINDS = {
    "LORA": "lora",
    "IA3": "ia3",
    "PROMPT_TUNING": "soft_prompt",
    "PREFIX_TUNING": "prefix",
    "CARTRIDGE": "cartridge",
}
#: Keys of their PEFT configs that these kinds compute.
COMPUTED = {
    "lora": frozenset(
        {
            "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "lora_bias",
            "rank_pattern", "alpha_pattern", "fan_in_fan_out", "target_modules",
            "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
            "init_lora_weights",
        }
    ),
    "ia3": frozenset(
        {
            "target_modules", "exclude_modules", "feedforward_modules", "fan_in_fan_out",
            "modules_to_save", "init_ia3_weights",
        }
    ),
    "soft_prompt": frozenset(
        {
            "num_virtual_tokens", "token_dim", "num_transformer_submodules",
            "num_attention_heads", "num_layers", "modules_to_save", "prompt_tuning_init",
            "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
        }
    ),
    "prefix": frozenset(
        {
            "num_virtual_tokens", "token_dim", "num_transformer_submodules",
            "num_attention_heads", "num_layers", "modules_to_save", "encoder_hidden_size",
            "prefix_projection", "init_weights",
        }
    ),
    "cartridge": frozenset(
        {
            "num_virtual_tokens", "token_dim", "num_transformer_submodules",
            "num_attention_heads", "num_layers", "modules_to_save", "num_frozen_tokens",
        }
    ),
}  # fmt: skip
#: Keys that say where an adapter comes from, or that mean nothing once it is trained.
DESCRIPTIVE = frozenset(
    {
        "peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision",
        "inference_mode", "auto_mapping", "megatron_core", "qalora_group_size", "runtime_config",
        "ensure_weight_tying", "eva_config",
    }
)  # fmt: skip
#: Initialisations that leave the backbone's weights alone; every other one rewrites them, or may.
HARMLESS_INIT = (True, False, None, "gaussian", "orthogonal", "eva", "mica")

_THROUGH_PEFT = "add it with --kind peft, to run it through PEFT"
_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias"
    r"|lora_magnitude_vector(\.weight)?|base_layer\.bias|bias)"
)


def check_computed(kind: str, config: Mapping[str, Any], where: str) -> None:
    """Refuses what an adapter config asks for and a brick of our own kind does not compute.

    Args:
        kind: one of `KINDS`.
        config: the content of ``adapter_config.json``.
        where: what to call the adapter in the error sentence.

    Raises:
        UserError: naming the feature, or the type where it is another one.
    """
    peft_type = config.get("peft_type")
    if KINDS.get(str(peft_type)) != kind:
        ours = next(name for name, one in KINDS.items() if one == kind)
        raise UserError(f"The adapter {where} is {peft_type}, not {ours}: {_THROUGH_PEFT}.")
    check_init(config, where)
    for key, value in config.items():
        if key not in COMPUTED[kind] | DESCRIPTIVE and not is_empty(value):
            raise UserError(
                f"The adapter {where} uses '{key}' ({str(value)[:60]}), which a brick of kind "
                f"{kind} does not compute: {_THROUGH_PEFT}."
            )
    if config.get("bias") == "all":
        raise UserError(
            f"The adapter {where} trained every bias of its model (bias: all), and a lora brick "
            f"only those of its own sites: {_THROUGH_PEFT}."
        )


def check_init(config: Mapping[str, Any], where: str) -> None:
    """Refuses an adapter that is right only on a backbone whose weights were rewritten for it."""
    init = config.get("init_lora_weights")
    if init not in HARMLESS_INIT or config.get("loftq_config"):
        raise UserError(
            f"The adapter {where} began with init_lora_weights={init!r}, which rewrites the "
            "weights of the backbone itself: convert it to a plain LoRA first (PEFT: "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=…)) and add that."
        )


def check_known(config: Mapping[str, Any], where: str) -> None:
    """Refuses what the installed PEFT would pass over with a warning."""
    catalogue = config_keys()
    peft_type = config["peft_type"]
    if peft_type not in catalogue:
        raise UserError(
            f"The adapter {where} is of the type {peft_type}, which the installed PEFT does not "
            f"know.{nearest(peft_type, catalogue)}"
        )
    for key, value in config.items():
        if key not in catalogue[peft_type] and not is_empty(value):
            raise UserError(
                f"The adapter {where} has the key '{key}' ({str(value)[:60]}), which the installed "
                f"PEFT does not know for {peft_type} and would ignore: update PEFT."
            )


def _check_lora_tensors(shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Every tensor is a part of a LoRA, and every A has its B."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        match = _PART.fullmatch(name)
        if match is None:
            raise _no_part(name, "lora", folder)
        modules.setdefault(match["module"], {})[match["part"]] = shape
    for module, parts in modules.items():
        a, b = parts.get("lora_A.weight", ()), parts.get("lora_B.weight", ())
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            raise UserError(
                f"The adapter {folder} has no lora_A and lora_B for '{module}' that are matrices "
                f"and fit (shapes {a or 'missing'} and {b or 'missing'}): save it again, or "
                f"{_THROUGH_PEFT}."
            )


def _check_ia3_tensors(shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Every tensor is a vector of factors, a row or a column."""
    for name, shape in shapes.items():
        if not name.endswith(".ia3_l") or len(shape) != 2 or 1 not in shape:
            raise _no_part(name, "ia3", folder)


def _check_prompt_tensors(shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """There is one tensor, a row of numbers for each virtual token."""
    for name, shape in shapes.items():
        if name != "prompt_embeddings" or len(shape) != 2:
            raise _no_part(name, "prompt", folder)


TENSOR_CHECKS = {
    "lora": _check_lora_tensors,
    "ia3": _check_ia3_tensors,
    "soft_prompt": _check_prompt_tensors,
    "prefix": _check_prompt_tensors,
    "cartridge": _check_prompt_tensors,
}


def _no_part(name: str, kind: str, folder: Path) -> UserError:
    return UserError(
        f"The adapter {folder} holds the tensor '{name}', which is no part of a brick of kind "
        f"{kind} (a trained embedding, or a new feature of PEFT): {_THROUGH_PEFT}."
    )


def is_empty(value: Any) -> bool:
    """Whether a key of a config says nothing; a zero does say something."""
    return value is None or value is False or (isinstance(value, dict | list | str) and not value)
