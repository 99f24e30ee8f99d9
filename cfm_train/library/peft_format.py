"""PEFT adapter folders: in (`read_folder`) and out (`export`), without PEFT and without torch.

The two files of an adapter stay as they are, so every artifact of a PEFT kind loads in PEFT straight
from the library. What our own LoRA computes becomes a brick of kind ``lora``; any other tuner becomes
kind ``peft`` and runs through PEFT itself. What would change the result unseen is refused by name:
initialisations that rewrite the backbone (PiSSA and its kin: PEFT's "paths to initial weights"),
features that our LoRA does not compute, and tensors that belong to neither.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfm_train.errors import UserError
from cfm_train.library import gate
from cfm_train.library.card import CARD_FILE, Card
from cfm_train.library.store import Library

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
ASIDE = "cfm_train"

#: Keys of PEFT's LoraConfig that a ``lora`` brick computes.
COMPUTED = frozenset(
    {
        "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "lora_bias", "rank_pattern",
        "alpha_pattern", "fan_in_fan_out", "target_modules", "exclude_modules", "layers_to_transform",
        "layers_pattern", "modules_to_save", "init_lora_weights",
    }
)  # fmt: skip
#: Keys that say where an adapter comes from, or that mean nothing once it is trained.
DESCRIPTIVE = frozenset(
    {
        "peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode",
        "auto_mapping", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
        "eva_config",
    }
)  # fmt: skip
#: Initialisations that leave the backbone's weights alone; every other one rewrites them, or may.
HARMLESS_INIT = (True, False, None, "gaussian", "orthogonal", "eva", "mica")

_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector(\.weight)?"
    r"|base_layer\.bias|bias)"
)


@dataclass(frozen=True)
class Adapter:
    """What `read_folder` found.

    Attributes:
        kind: ``lora`` or ``peft``.
        files: the files to store, by name.
        interface: what, with the tensors, defines the brick.
        base: the backbone's name as PEFT wrote it, None if it did not.
        aside: tensors of trained modules (PEFT's ``modules_to_save``, mostly a classifier) that only
            PEFT uses: the brick carries them, and export gives them back.
        licence: from the folder's own model card.
    """

    kind: str
    files: dict[str, Path]
    interface: dict[str, Any]
    base: str | None = None
    aside: list[str] = field(default_factory=list)
    licence: str | None = None


def read_folder(folder: Path, kind: str | None = None) -> Adapter:
    """Recognises a PEFT adapter folder.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        kind: ``lora`` or ``peft`` to insist on one, None to choose by the adapter's type.

    Raises:
        UserError: it is no adapter folder, its weights are pickled or damaged, or it has a feature
            that would be ignored.
    """
    config = read_config(folder)
    peft_type = config["peft_type"]
    tensors = gate.check_tensors(_weights(folder))
    if not tensors:
        raise UserError(f"{folder / TENSOR_FILE} holds no tensor: save the adapter again.")
    _check_init(config, folder)
    kind = kind or ("lora" if peft_type == "LORA" else "peft")
    if kind == "lora":
        if peft_type != "LORA":
            raise UserError(
                f"The adapter in {folder} is {peft_type}, not LORA: add it with --kind peft."
            )
        check_lora(config, str(folder))
        _check_lora_tensors({name: info.shape for name, info in tensors.items()}, config, folder)
    base = config.get("base_model_name_or_path") or None
    return Adapter(
        kind=kind,
        files={name: folder / name for name in (CONFIG_FILE, TENSOR_FILE)},
        interface={"kind": kind, "peft": function_of(config)},
        base=base,
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
            f"{folder} is no PEFT adapter: it has no {CONFIG_FILE} (PEFT writes one with save_pretrained)."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): save the adapter again.") from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise UserError(f"{path} names no 'peft_type': it is no config of a PEFT adapter.")
    return config


def function_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an adapter config that decides what it computes, in one order and without empty keys."""
    kept = {}
    for key, value in config.items():
        if (key in DESCRIPTIVE and key != "peft_type") or _is_empty(value):
            continue
        # PEFT writes these from sets, in a different order each time.
        unordered = key in ("target_modules", "exclude_modules", "modules_to_save") and isinstance(
            value, list
        )
        kept[key] = sorted(value) if unordered else value
    return kept


def check_lora(config: Mapping[str, Any], where: str) -> None:
    """Refuses what a LoRA config asks for and a ``lora`` brick does not compute.

    Args:
        config: the content of ``adapter_config.json``.
        where: what to call the adapter in the error sentence.

    Raises:
        UserError: naming the feature.
    """
    for key, value in config.items():
        if key not in COMPUTED | DESCRIPTIVE and not _is_empty(value):
            raise UserError(
                f"The adapter {where} uses '{key}' ({str(value)[:60]}), which a lora brick does not compute: "
                "add it with --kind peft, to run it through PEFT."
            )
    _check_init(config, where)
    if config.get("bias", "none") == "all":
        raise UserError(
            f"The adapter {where} trained every bias of its model (bias: all), and a lora brick only those of "
            "its own sites: add it with --kind peft, to run it through PEFT."
        )


def _check_init(config: Mapping[str, Any], where: object) -> None:
    init = config.get("init_lora_weights")
    if init not in HARMLESS_INIT or config.get("loftq_config") or config.get("corda_config"):
        raise UserError(
            f"The adapter {where} began with init_lora_weights='{init}', which rewrites the weights of the "
            "backbone itself: convert it to a plain LoRA first (PEFT: save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=…)) and add that."
        )


def _check_lora_tensors(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], folder: Path
) -> None:
    """Every tensor is a part of a LoRA or of a saved module, and every A has its B."""
    aside, parts = set(aside_tensors(config, shapes)), dict[str, dict[str, tuple[int, ...]]]()
    for name, shape in shapes.items():
        if name in aside:
            continue
        match = _PART.fullmatch(name)
        if match is None:
            raise UserError(
                f"The adapter {folder} holds the tensor '{name}', which is no part of a lora brick (a trained "
                "embedding, or a new feature of PEFT): add it with --kind peft, to run it through PEFT."
            )
        parts.setdefault(match["module"], {})[match["part"]] = shape
    for module, found in parts.items():
        a, b = found.get("lora_A.weight", ()), found.get("lora_B.weight", ())
        if set(found) <= {"bias", "base_layer.bias"}:
            raise UserError(
                f"The adapter {folder} has a bias but no LoRA for '{module}': add it with --kind peft."
            )
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            raise UserError(
                f"The adapter {folder} has no matching pair lora_A, lora_B of two dimensions for '{module}' "
                f"(shapes {a or 'missing'} and {b or 'missing'}): save it again, or add it with --kind peft."
            )


def aside_tensors(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Tensors of modules that PEFT trained and saved whole (``modules_to_save``), such as a classifier.

    Args:
        config: the content of ``adapter_config.json``.
        names: the names of all tensors in the adapter.

    Returns:
        Their names, sorted.
    """
    modules = set(config.get("modules_to_save") or [])
    found = []
    for name in names:
        stem = name.removeprefix("base_model.model.")
        if (
            any(re.search(rf"(^|\.){re.escape(module)}\.", stem) for module in modules)
            and "lora_" not in stem
        ):
            found.append(name)
    return sorted(found)


def _is_empty(value: Any) -> bool:
    """Whether a key of a config says nothing; a zero does say something."""
    return value is None or value is False or (isinstance(value, dict | list | str) and not value)


def _weights(folder: Path) -> Path:
    path = folder / TENSOR_FILE
    if path.is_file():
        return path
    pickled = sorted(file.name for file in folder.iterdir() if file.name.endswith(gate.PICKLES))
    if pickled:
        gate.check_file(pickled[0], str(folder))
    raise UserError(
        f"{folder} lacks {TENSOR_FILE}: save the adapter again (PEFT: save_pretrained)."
    )


def _licence(folder: Path) -> str | None:
    """The licence that the folder's own model card names."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    licence = re.search(r"^license:\s*([\w.+-]+)\s*$", front[1], re.MULTILINE) if front else None
    return licence[1] if licence else None


def export(library: Library, card: Card, folder: Path) -> list[str]:
    """Writes an artifact as a PEFT adapter folder.

    What PEFT does not know (the card, heads of cfm_train) lies aside, in the subfolder ``cfm_train``.

    Args:
        library: holds the artifact.
        card: the artifact's card.
        folder: the new folder; it must be empty or not exist.

    Returns:
        The names of the files, relative to ``folder``.

    Raises:
        UserError: the artifact is not in PEFT's format, or the folder holds something.
    """
    if CONFIG_FILE not in card.files or TENSOR_FILE not in card.files:
        raise UserError(
            f"{card.ref} is a '{card.kind}' brick, for which PEFT has no format: use it through cfm_train, or "
            "copy its folder with `push REF FOLDER`."
        )
    source = library.folder(card)
    gate.check_artifact(card, source)
    contents = {name: (source / name).read_bytes() for name in card.files}
    written = {
        name: contents.pop(name)
        for name in (CONFIG_FILE, TENSOR_FILE, "README.md")
        if name in contents
    }
    written |= {f"{ASIDE}/{name}": content for name, content in contents.items()}
    written[f"{ASIDE}/{CARD_FILE}"] = card.to_json().encode()
    write_folder(folder, written)
    return sorted(written)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a new folder whole or not at all.

    Args:
        folder: the folder; it must be empty or not exist.
        files: content by path, relative to the folder.

    Raises:
        UserError: the folder holds something, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: write to a new one.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            new = Path(temporary) / "new"
            for name, content in files.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                (new / name).write_bytes(content)
            os.replace(new, folder)
    except OSError as error:
        raise UserError(
            f"{folder} could not be written ({error.strerror or error}): choose another."
        ) from None
