"""PEFT adapter folders read as low-rank bricks without the backbone that they belong to.

What a low-rank merge needs of a backbone are names and widths, and those stand in the adapters: a
module's name is the site's, its factors tell how wide it is. `Frame` is that much of a backbone.
What needs the backbone's weights (DoRA's magnitudes, biases trained in place of its own) is refused
by name, and so are adapters that cannot belong to one backbone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.backbone.sites import Site, SiteMap
from cfm_train.backbone.tensors import NUMBERED
from cfm_train.errors import UserError
from cfm_train.library.peft_format import CONFIG_FILE, TENSOR_FILE, read_config, read_folder
from cfm_train.library.tensorfile import TensorInfo, pieces, read_header

#: What PEFT puts before the path of every module.
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Frame:
    """The part of a backbone that its adapters tell.

    Attributes:
        id: what error sentences call it.
        family: of the adapters' task; nothing that is merged depends on it.
        sites: one for each module that an adapter updates, named like the module.
        device: where tensors are merged.
    """

    id: str
    family: str
    sites: SiteMap
    device: str = "cpu"

    @property
    def model(self) -> Any:
        """There is none.

        Raises:
            UserError: always.
        """
        raise UserError(
            "This merge depends on the backbone's own weights, which adapter folders do not hold: "
            "add the adapters to a library, and use recipe=merge/linear or another."
        )


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that may be merged.

    Attributes:
        folder: where it lies.
        config: the content of ``adapter_config.json``.
        modules: module path -> inputs and outputs.
        aside: whole modules that PEFT saved with it, such as a classifier: name -> SHA-256.
        hash: SHA-256 of its tensors' file.
    """

    folder: Path
    config: dict[str, Any]
    modules: dict[str, tuple[int, int]]
    aside: dict[str, str]
    hash: str


@dataclass(frozen=True)
class Adapters:
    """Adapters of one backbone.

    Attributes:
        all: the adapters, in order.
        frame: what they tell of their backbone.
        base: the backbone as PEFT names it, None where no adapter does.
        task_type: PEFT's word, None where they do not agree.
    """

    all: list[Adapter]
    frame: Frame
    base: str | None
    task_type: str | None


def open_adapters(folders: Sequence[Path], base: str | None = None) -> Adapters:
    """Finds adapters and holds them against each other, without torch.

    Args:
        folders: PEFT adapter folders.
        base: what their backbone is called, where their configs name it differently.

    Raises:
        UserError: one is no LoRA adapter, has a feature that cannot be merged without the
            backbone, or they cannot belong to one backbone.
    """
    found = [_open(folder) for folder in folders]
    first = found[0]
    for other in found[1:]:
        _same_widths(first, other)
        _same_modules_to_save(first, other)
        if bool(first.config.get("fan_in_fan_out")) != bool(other.config.get("fan_in_fan_out")):
            raise UserError(
                f"{first.folder} and {other.folder} differ in fan_in_fan_out, so their modules "
                "store weights in different ways: they belong to different backbones."
            )
    _one_naming(found)
    bases = sorted({str(b) for a in found if (b := a.config.get("base_model_name_or_path"))})
    if base is None and len(bases) > 1:
        raise UserError(
            f"The adapters name different backbones ({' and '.join(bases)}): if these are one, say "
            "what it is called with --base."
        )
    tasks = {adapter.config.get("task_type") for adapter in found}
    name = base or (bases[0] if bases else None)
    task = tasks.pop() if len(tasks) == 1 else None
    return Adapters(found, _frame(found, name), name, task)


def _open(folder: Path) -> Adapter:
    config = read_config(folder)
    if config["peft_type"] != "LORA":
        raise UserError(
            f"The adapter {folder} is {config['peft_type']}: only LoRA adapters are merged as "
            "files; add others to a library and use recipe=merge/linear or another."
        )
    for key, what in (("use_dora", "is a DoRA"), ("bias", "trained biases of its backbone anew")):
        if config.get(key) not in (None, False, "none") and config.get(key) != "all":
            raise UserError(
                f"The adapter {folder} {what} ({key}: {config[key]}), so its update depends on the "
                "backbone's own weights: add it to a library and merge it there, with merge.rank."
            )
    adapter = read_folder(folder, "lora")
    path = folder / TENSOR_FILE
    with path.open("rb") as file:
        infos = read_header(file, str(path))
        aside = {name: _hash(file, infos[name]) for name in adapter.aside}
        file.seek(0)
        whole = hashlib.file_digest(file, "sha256").hexdigest()
    modules: dict[str, tuple[int, int]] = {}
    for name, info in infos.items():
        if name in aside or not name.endswith(".lora_A.weight"):
            continue
        stem = name.removesuffix(".lora_A.weight")
        out = infos[f"{stem}.lora_B.weight"].shape[0]
        modules[stem.removeprefix(_PREFIX)] = (info.shape[1], out)
    if not modules:
        raise UserError(f"The adapter {folder} updates no module: there is nothing to merge.")
    return Adapter(folder, config, modules, aside, whole)


def _hash(file: Any, info: TensorInfo) -> str:
    digest = hashlib.sha256(f"{info.dtype} {info.shape}".encode())
    for piece in pieces(file, info):
        digest.update(piece)
    return digest.hexdigest()


def _same_widths(one: Adapter, other: Adapter) -> None:
    for module in one.modules.keys() & other.modules.keys():
        a, b = one.modules[module], other.modules[module]
        if a != b:
            raise UserError(
                f"'{module}' maps {a[0]} to {a[1]} features in {one.folder} and {b[0]} to {b[1]} "
                f"in {other.folder}: they belong to different backbones."
            )


def _same_modules_to_save(one: Adapter, other: Adapter) -> None:
    """Modules that were trained whole are carried like heads: never averaged."""
    for name in sorted(one.aside.keys() & other.aside.keys()):
        if one.aside[name] != other.aside[name]:
            raise UserError(
                f"{one.folder} and {other.folder} bring different modules_to_save ('{name}'), and "
                "whole modules are not averaged: merge adapters that share them, or have none."
            )


def _one_naming(found: Sequence[Adapter]) -> None:
    """Refuses names that differ by a wrapper's prefix: they would be merged as two modules."""
    names = {module: adapter for adapter in found for module in adapter.modules}
    for module, adapter in names.items():
        parts = module.split(".")
        for start in range(1, len(parts)):
            short = ".".join(parts[start:])
            if short in names:
                raise UserError(
                    f"What {adapter.folder} calls '{module}' may be what {names[short].folder} "
                    f"calls '{short}': train or save both on the same class of model."
                )


def _frame(found: Sequence[Adapter], base: str | None) -> Frame:
    transposed = bool(found[0].config.get("fan_in_fan_out"))
    widths = {module: width for adapter in found for module, width in adapter.modules.items()}
    sites = [
        Site(module, module, "linear", inn, out, transposed=transposed)
        for module, (inn, out) in sorted(widths.items(), key=lambda item: _in_order(item[0]))
    ]
    return Frame(base or "the adapters' backbone", "decoder", SiteMap(sites, 0, _layers(widths)))


def _in_order(module: str) -> list[tuple[int, str]]:
    """Layer 10 after layer 9."""
    return [(int(p), "") if p.isdigit() else (0, p) for p in module.split(".")]


def _layers(modules: Mapping[str, Any]) -> dict[str, int]:
    """How many layers each stack has, as far as the adapters reach."""
    found: dict[str, int] = {}
    for module in modules:
        if match := NUMBERED.fullmatch(module):
            stack = f"{match['stack']}."
            found[stack] = max(found.get(stack, 0), int(match["layer"]) + 1)
    return found or {"": 1}


__all__ = ["CONFIG_FILE", "TENSOR_FILE", "Adapter", "Adapters", "Frame", "open_adapters"]
