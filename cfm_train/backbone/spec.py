"""Where a backbone lies: an installed package, a local folder or the Hub. No torch here.

Every check that needs no tensor is made before torch is imported: the folder exists, its config is
JSON, its weights are safetensors, complete and not cut short, and the pinned hash is right. Only
file headers are read, so the answer comes at once on a 16 GB folder too.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.backbone.fingerprint import file_hash
from cfm_train.errors import UserError

#: What is fetched from the Hub: weights as safetensors, config, tokenizer. No code, no pickle.
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_HUB_IGNORED = ["*/*", "*onnx*", "*openvino*", "*training_args*", "consolidated*"]


@dataclass(frozen=True)
class ResolvedBackbone:
    """A backbone on this machine.

    Attributes:
        id: the name that cards and records give it.
        folder: holds ``config.json``, weights and tokenizer.
        files: the weight files, safetensors.
        config: the content of ``config.json``.
    """

    id: str
    folder: Path
    files: list[Path]
    config: dict[str, Any]


def resolve(section: Mapping[str, Any], key: str = "backbone") -> ResolvedBackbone:
    """Finds the backbone that the ``backbone`` section of a config names.

    Args:
        section: keys ``id``, ``package``, ``path``, ``revision`` and ``sha256``. With a
            ``package``, ``path`` is a folder inside it; else a local folder or a Hub id.
        key: what the section is called in the config.

    Returns:
        The backbone's folder, files and config.

    Raises:
        UserError: nothing is there, the network is needed and absent, the weights are pickles,
            incomplete or cut short, or the pinned hash differs.
    """
    package, path = section.get("package"), section.get("path")
    if package:
        folder = _in_package(str(package), str(path or ""), key)
    elif not path:
        choice = "backbone" if key == "backbone" else f"backbone@{key}"
        raise UserError(
            f"The backbone has no '{key}.path': give a folder or a Hub id, as in "
            f"{key}.path=some/folder, or choose {choice}=minilm."
        )
    else:
        folder = find_folder(str(path), section.get("revision"), f"{key}.path")
    config = read_config(folder)
    files = weight_files(folder)
    for file in files:
        check_safetensors(file)
    _check_pin(files, section.get("sha256"), key)
    name = section.get("id")
    if not name or name == path:  # a path says little in a table, and much about a machine
        name = _name(path, folder)
    return ResolvedBackbone(str(name), folder, files, config)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a backbone folder; UserError where it is absent or no JSON object."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"The backbone folder '{folder}' has no config.json: give the folder that "
            "save_pretrained() wrote."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read '{folder / 'config.json'}' ({error}): repair it.") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(
            f"'{folder / 'config.json'}' names no 'model_type': it is not the config of a "
            "transformers model."
        )
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a backbone folder, in order; UserError where one is missing."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"'{index}' is not an index of weight files: fetch it again.") from None
        for name in names:
            if Path(name).name != name:
                raise UserError(f"'{index}' points outside of its folder ('{name}'): refused.")
            if not (folder / name).is_file():
                raise UserError(f"The backbone folder '{folder}' lacks '{name}': fetch it again.")
        return [folder / name for name in names]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise UserError(
            f"The backbone folder '{folder}' has only pickled weights, which can run code: convert "
            "them to model.safetensors (save_pretrained() writes it)."
        )
    raise UserError(
        f"The backbone folder '{folder}' has no weights (model.safetensors): fetch them."
    )


def check_safetensors(path: Path) -> None:
    """Compares a safetensors header with the file's size: UserError where the file is cut short."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length)) if length <= size else None
        if header is None:
            raise ValueError
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise UserError(
            f"The weights '{path}' are not a safetensors file (broken header): fetch them again."
        ) from None
    if size != 8 + length + end:
        raise UserError(
            f"The weights '{path}' have {size} bytes where their header tells {8 + length + end}: "
            "the file is cut short or damaged, fetch it again."
        )


def _check_pin(files: list[Path], pinned: str | None, key: str) -> None:
    if not pinned:
        return
    if len(files) != 1:
        raise UserError(
            f"'{key}.sha256' pins one weight file, but this backbone has {len(files)} shards: "
            "remove the key."
        )
    found = file_hash(files[0])
    if found != str(pinned).lower():
        raise UserError(
            f"The weights '{files[0]}' have SHA-256 {found[:12]}…, but '{key}.sha256' pins "
            f"{str(pinned)[:12]}…: they are not the backbone that this recipe was made for."
        )


def _in_package(package: str, inside: str, key: str) -> Path:
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"The package '{package}' of '{key}.package' is not installed: run "
            f"pip install {package.replace('_', '-')}."
        )
    root = Path(found.submodule_search_locations[0]).resolve()
    folder = (root / inside).resolve()
    if not folder.is_relative_to(root) or not folder.is_dir():
        choice = "backbone" if key == "backbone" else f"backbone@{key}"
        raise UserError(
            f"The package '{package}' has no folder '{inside}' ('{key}.path'): for a model of your "
            f"own add {choice}=hf."
        )
    return folder


def find_folder(path: str, revision: str | None, key: str = "backbone.path") -> Path:
    """The folder of a model: on this machine, or a snapshot from the Hub.

    Args:
        path: a folder or a Hub id.
        revision: of the Hub.
        key: what names it in the config.

    Raises:
        UserError: there is neither such a folder nor such a model.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise UserError(f"'{key}' is the file '{path}': give the folder that holds it.")
    # A Hub id is "name" or "organisation/name"; anything else can only have meant a folder.
    parts = path.split("/")
    if path.startswith((".", "~", "/")) or len(parts) > 2 or not all(parts):
        raise UserError(f"There is no {key.partition('.')[0]} folder '{path}' ('{key}').")
    return _from_hub(path, revision, key)


def _from_hub(repo: str, revision: str | None, key: str) -> Path:
    """The snapshot of a Hub model: from the local cache where it is complete, else fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    def snapshot(local: bool) -> Path:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=_HUB_FILES,
                ignore_patterns=_HUB_IGNORED,
                local_files_only=local,
            )
        )

    try:
        # What was fetched once is used as it is: the same command finds the same backbone again.
        folder = snapshot(local=True)
        weight_files(folder)
        return folder
    except (OSError, ValueError, UserError):
        pass
    try:
        return snapshot(local=False)
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"'{key}={repo}' is no folder here and no model on the Hub: check the spelling "
            "(a private model needs HF_TOKEN)."
        ) from None
    except Exception as error:
        # The client's network errors share no base class across its versions.
        raise UserError(
            f"'{key}={repo}' is no folder here and could not be fetched from the Hub "
            f"({type(error).__name__}): check the network, or give a local folder."
        ) from None


def _name(path: object, folder: Path) -> str:
    text = str(path or folder.name)
    return folder.name if Path(text).expanduser().is_dir() else text
