"""PEFT adapter folders as bricks, without importing PEFT or torch.

The two files of an adapter stay as they are, so every artifact of a PEFT kind loads in PEFT
straight from the library. What our own LoRA, IA3 and prompts compute becomes a brick of one of our
kinds (`KINDS`); any other tuner becomes kind ``peft`` and runs through PEFT itself. What would
change a result unseen is refused by name: initialisations that rewrite the backbone (PiSSA and its
kin), features that our bricks do not compute, keys that the installed PEFT would pass over, tensors
that belong to nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.errors import UserError, nearest
from cfm_train.library import gate
from cfm_train.library.peft_catalogue import config_keys

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

#: Our own kinds that read PEFT's format, by PEFT's name for them.
KINDS = {
    "LORA": "lora",
    "IA3": "ia3",
    "PROMPT_TUNING": "soft_prompt",
    "PREFIX_TUNING": "prefix",
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
#: Keys that PEFT writes from sets, in another order each time.
_SETS = ("target_modules", "exclude_modules", "modules_to_save")
_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias"
    r"|lora_magnitude_vector(\.weight)?|base_layer\.bias|bias)"
)


@dataclass(frozen=True)
class Adapter:
    """What `read_folder` found.

    Attributes:
        kind: one of `KINDS`, or ``peft``.
        files: the files to store, by name.
        interface: what, with the tensors, defines the brick.
        base: the backbone as PEFT names it, None where it does not.
        aside: tensors that only PEFT uses, see `aside_tensors`.
        licence: from the folder's own model card.
    """

    kind: str
    files: dict[str, Path]
    interface: dict[str, Any]
    base: str | None
    aside: list[str]
    licence: str | None


def read_folder(folder: Path, kind: str | None = None) -> Adapter:
    """Recognises a PEFT adapter folder.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        kind: the kind to insist on, None to choose by the adapter's type.

    Raises:
        UserError: it is no adapter folder, its weights are pickled or damaged, or it has a feature
            that would be ignored.
    """
    config = read_config(folder)
    tensors = gate.check_tensors(_weights(folder))
    if not tensors:
        raise UserError(f"{folder / TENSOR_FILE} holds no tensor: save the adapter again.")
    _check_init(config, str(folder))
    kind = kind or KINDS.get(config["peft_type"], "peft")
    if kind == "peft":
        _check_known(config, str(folder))
    else:
        _check_computed(kind, config, str(folder))
        shapes = {name: info.shape for name, info in tensors.items()}
        for name in aside_tensors(config, shapes):
            del shapes[name]
        _CHECKS[kind](shapes, folder)
    return Adapter(
        kind=kind,
        files={name: folder / name for name in (CONFIG_FILE, TENSOR_FILE)},
        interface={"kind": kind, "peft": function_of(config)},
        base=config.get("base_model_name_or_path") or None,
        aside=aside_tensors(config, tensors),
        licence=_licence(folder),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The content of ``adapter_config.json``.

    Raises:
        UserError: there is none, it is not JSON, or it names no adapter type.
    """
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} is no PEFT adapter: it has no {CONFIG_FILE} (save_pretrained writes one)."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): save the adapter again.") from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise UserError(f"{path} names no 'peft_type': it is no config of a PEFT adapter.")
    return config


def function_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an adapter config that decides what it computes: no empty keys, sets sorted."""
    return {
        key: sorted(value) if key in _SETS and isinstance(value, list) else value
        for key, value in config.items()
        if (key == "peft_type" or key not in DESCRIPTIVE) and not _is_empty(value)
    }


def check_lora(config: Mapping[str, Any], where: str) -> None:
    """Refuses what an adapter config asks for and a ``lora`` brick does not compute.

    Args:
        config: the content of ``adapter_config.json``.
        where: what to call the adapter in the error sentence.

    Raises:
        UserError: naming the feature.
    """
    _check_computed("lora", config, where)


def _check_computed(kind: str, config: Mapping[str, Any], where: str) -> None:
    if KINDS.get(str(config.get("peft_type"))) != kind:
        raise UserError(
            f"The adapter {where} is {config.get('peft_type')}, not {kind.upper()}: "
            f"{_THROUGH_PEFT}."
        )
    _check_init(config, where)
    for key, value in config.items():
        if key not in COMPUTED[kind] | DESCRIPTIVE and not _is_empty(value):
            raise UserError(
                f"The adapter {where} uses '{key}' ({str(value)[:60]}), which a brick of kind "
                f"{kind} does not compute: {_THROUGH_PEFT}."
            )
    if config.get("bias") == "all":
        raise UserError(
            f"The adapter {where} trained every bias of its model (bias: all), and a lora brick "
            f"only those of its own sites: {_THROUGH_PEFT}."
        )


def aside_tensors(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Tensors of modules that PEFT trained and saved whole (``modules_to_save``: a classifier).

    They belong to a task model that cfm_train does not build: the brick carries them along, its
    body does without them, and what is exported has them again.

    Args:
        config: the content of ``adapter_config.json``.
        names: the names of all tensors in the adapter.

    Returns:
        Their names, sorted.
    """
    modules = "|".join(re.escape(module) for module in config.get("modules_to_save") or [])
    whole = re.compile(rf"(.*\.)?({modules})\.(?!.*lora_).*")
    return sorted(name for name in names if modules and whole.fullmatch(name))


def _check_init(config: Mapping[str, Any], where: str) -> None:
    init = config.get("init_lora_weights")
    if init not in HARMLESS_INIT or config.get("loftq_config"):
        raise UserError(
            f"The adapter {where} began with init_lora_weights={init!r}, which rewrites the "
            "weights of the backbone itself: convert it to a plain LoRA first (PEFT: "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=…)) and add that."
        )


def _check_known(config: Mapping[str, Any], where: str) -> None:
    """Refuses what the installed PEFT would pass over with a warning."""
    catalogue = config_keys()
    peft_type = config["peft_type"]
    if peft_type not in catalogue:
        raise UserError(
            f"The adapter {where} is of the type {peft_type}, which the installed PEFT does not "
            f"know.{nearest(peft_type, catalogue)}"
        )
    for key, value in config.items():
        if key not in catalogue[peft_type] and not _is_empty(value):
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


_CHECKS = {
    "lora": _check_lora_tensors,
    "ia3": _check_ia3_tensors,
    "soft_prompt": _check_prompt_tensors,
    "prefix": _check_prompt_tensors,
}


def _no_part(name: str, kind: str, folder: Path) -> UserError:
    return UserError(
        f"The adapter {folder} holds the tensor '{name}', which is no part of a brick of kind "
        f"{kind} (a trained embedding, or a new feature of PEFT): {_THROUGH_PEFT}."
    )


def _is_empty(value: Any) -> bool:
    """Whether a key of a config says nothing; a zero does say something."""
    return value is None or value is False or (isinstance(value, dict | list | str) and not value)


def _weights(folder: Path) -> Path:
    path = folder / TENSOR_FILE
    if not path.is_file():
        for file in sorted(folder.iterdir()):
            if file.name.startswith("adapter_model"):
                gate.check_file(file.name, str(folder))
        raise UserError(f"{folder} lacks {TENSOR_FILE}: save the adapter again (save_pretrained).")
    return path


def _licence(folder: Path) -> str | None:
    """The licence that the folder's own model card names."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    licence = re.search(r"^license:\s*([\w.+-]+)\s*$", front[1], re.MULTILINE) if front else None
    return licence[1] if licence else None
