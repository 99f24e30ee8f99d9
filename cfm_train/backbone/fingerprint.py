"""Who a backbone is: the SHA-256 of its config and weights, and of its tokenizer.

A brick fits one backbone only, so every brick's card names the fingerprint that it needs. Hashing a
large model takes a while and its files never change in between, so the hash of a file is cached by
path, size and modification time: the second look at a 16 GB folder costs a few milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from cfm_train.errors import UserError
from cfm_train.paths import cache_dir

#: From this size on, hashing shows how far it is.
SHOW_PROGRESS_BYTES = 1 << 30

_BLOCK = 1 << 22

#: Everything that can change which token ids a text becomes.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)


def fingerprint(folder: Path) -> str:
    """The identity of a backbone.

    Args:
        folder: a folder with ``config.json`` and safetensors weights, in one file or in shards.

    Returns:
        64 hexadecimal digits: SHA-256 over the names and SHA-256 hashes of config and weights.

    Raises:
        UserError: the folder has no config or no weights, or a file cannot be read.
    """
    from cfm_train.backbone.spec import weight_files

    return _combined([folder / "config.json", *weight_files(folder)])


def tokenizer_hash(folder: Path) -> str:
    """The identity of a backbone's tokenizer.

    Args:
        folder: the backbone's folder.

    Returns:
        64 hexadecimal digits over every tokenizer file in the folder.

    Raises:
        UserError: the folder has no tokenizer file.
    """
    return _combined(tokenizer_files(folder))


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer files in a backbone's folder; UserError where there is none."""
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise UserError(
            f"The backbone folder '{folder}' has no tokenizer (no tokenizer.json or vocabulary): "
            "copy the model's tokenizer files into it."
        )
    return files


def file_hash(path: Path) -> str:
    """SHA-256 of a file, from the cache where path, size and modification time are as before.

    Args:
        path: the file; links are followed, so that a Hub cache and a plain folder behave alike.

    Returns:
        64 hexadecimal digits.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        real = path.resolve(strict=True)
        status = real.stat()
        key = hashlib.sha256(str(real).encode()).hexdigest()
        entry = cache_dir() / "hashes" / f"{key}.json"
        stamp = {"path": str(real), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
        known = _read_entry(entry)
        if known is not None and {k: known.get(k) for k in stamp} == stamp:
            return str(known["sha256"])
        digest = _hash(real, status.st_size)
    except OSError as error:
        raise UserError(
            f"Cannot read '{path}' of the backbone ({error.strerror or error}): check the folder."
        ) from error
    _write_entry(entry, {**stamp, "sha256": digest})
    return digest


def _combined(files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in sorted(files, key=lambda p: p.name):
        total.update(f"{path.name}:{file_hash(path)}\n".encode())
    return total.hexdigest()


def _hash(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if size < SHOW_PROGRESS_BYTES:
            while block := file.read(_BLOCK):
                digest.update(block)
        else:
            # Only a long wait is worth the import.
            from tqdm import tqdm

            with tqdm(total=size, unit="B", unit_scale=True, desc=f"hashing {path.name}") as bar:
                while block := file.read(_BLOCK):
                    digest.update(block)
                    bar.update(len(block))
    return digest.hexdigest()


def _read_entry(path: Path) -> dict[str, object] | None:
    try:
        entry = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return entry if isinstance(entry, dict) and "sha256" in entry else None


def _write_entry(path: Path, entry: dict[str, object]) -> None:
    """Writes a cache entry in one step; a cache that cannot be written is only slower."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    except OSError:
        return
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(entry, file)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
