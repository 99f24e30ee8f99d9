"""PEFT adapter folders as bricks, without importing PEFT or torch.

The two files of an adapter stay as they are, so every artifact of a PEFT kind loads in PEFT
straight from the library. What our own LoRA, IA3 and prompts compute becomes a brick of one of our
kinds (`KINDS`); any other tuner becomes kind ``peft`` and runs through PEFT itself. What would
change a result unseen is refused by name (`peft_checks.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.errors import UserError
from cfm_train.library import gate
from cfm_train.library.peft_checks import (
    DESCRIPTIVE,
    KINDS,
    TENSOR_CHECKS,
    check_computed,
    check_init,
    check_known,
    is_empty,
)
from cfm_train.library.tensorfile import TensorInfo

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

#: Keys that PEFT writes from sets, in another order each time.
_SETS = ("target_modules", "exclude_modules", "modules_to_save")


@dataclass(frozen=True)
class Adapter:
    """What `read_folder` found.

    Attributes:
        kind: one of `KINDS`, or ``peft``.
        files: the files to store, by name.
        tensors: every tensor by name, as the header has it.
        interface: what, with the tensors, defines the brick.
        base: the backbone as PEFT names it, None where it does not.
        aside: tensors that only PEFT uses, see `aside_tensors`.
        licence: from the folder's own model card.
    """

    kind: str
    files: dict[str, Path]
    tensors: dict[str, TensorInfo]
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
    check_init(config, str(folder))
    kind = kind or KINDS.get(config["peft_type"], "peft")
    if kind == "peft":
        check_known(config, str(folder))
    else:
        check_computed(kind, config, str(folder))
        shapes = {name: info.shape for name, info in tensors.items()}
        for name in aside_tensors(config, shapes):
            del shapes[name]
        TENSOR_CHECKS[kind](shapes, folder)
    return Adapter(
        kind=kind,
        files={name: folder / name for name in (CONFIG_FILE, TENSOR_FILE)},
        tensors=tensors,
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
        if (key == "peft_type" or key not in DESCRIPTIVE) and not is_empty(value)
    }


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
