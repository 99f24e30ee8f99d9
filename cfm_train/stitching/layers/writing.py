"""Writes a backbone tensor by tensor: bytes go from file to file, a few megabytes at a time.

Nothing is decoded, so values stay what they are to the last bit, and memory does not grow with the
model. The folder is written aside and renamed, so it is whole or not there; then every tensor is
read again and its SHA-256 compared with that of its source.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from cfm_train.backbone.fingerprint import tokenizer_files
from cfm_train.backbone.spec import weight_files
from cfm_train.errors import UserError
from cfm_train.library.tensorfile import BITS, pieces, read_header
from cfm_train.stitching.layers.sources import Placed

#: Kept free on the disk beside what is written.
SPARE_BYTES = 64 * 2**20


def size_of(tensors: Mapping[str, Placed]) -> int:
    """Bytes of all tensors together."""
    return sum(placed.info.end - placed.info.begin for placed in tensors.values())


def check_room(out: Path, needed: int) -> None:
    """Refuses a folder whose disk has no room, or that may not be written.

    Raises:
        UserError: with what is free and what is needed.
    """
    there = next(parent for parent in out.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"out: cannot write into {there}; choose another folder with out=DIR.")
    free = shutil.disk_usage(there).free
    if free < needed + SPARE_BYTES:
        raise UserError(
            f"out: the disk of {there} has {free / 2**20:.0f} MB free, and the stitched model "
            f"needs {(needed + SPARE_BYTES) / 2**20:.0f}: make room or choose another out=DIR."
        )


def write_backbone(
    out: Path,
    tensors: Mapping[str, Placed],
    texts: Mapping[str, str],
    companion: Path,
    shard_bytes: int,
) -> bool:
    """Writes a transformers model folder.

    Args:
        out: the folder; it must not exist, or be empty.
        tensors: name -> where the bytes lie now.
        texts: further files, such as ``config.json``.
        companion: the folder whose tokenizer and generation config are copied.
        shard_bytes: most bytes of one weight file.

    Returns:
        Whether every tensor, read again, is its source's to the bit.
    """
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        hashes = _write_shards(aside, tensors, shard_bytes)
        for path in tokenizer_files(companion):
            shutil.copyfile(path, aside / path.name)
        if (companion / "generation_config.json").is_file():
            shutil.copyfile(companion / "generation_config.json", aside / "generation_config.json")
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")
        for path in aside.iterdir():
            _flush(path)
        same = _hashes(aside) == hashes
        if out.is_dir():
            out.rmdir()  # an empty folder that the person made for it
        os.rename(aside, out)
        _flush(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return same


def _write_shards(folder: Path, tensors: Mapping[str, Placed], most: int) -> dict[str, str]:
    """Writes the weight files, and the index of several; the SHA-256 of each tensor's source."""
    # Widest elements first, then by name: so every tensor begins at a multiple of its element.
    order = sorted(tensors, key=lambda name: (-BITS[tensors[name].info.dtype], name))
    shards: list[list[str]] = [[]]
    filled = 0
    for name in order:
        size = size_of({name: tensors[name]})
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    hashes: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        hashes |= _write_shard(folder / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size_of(tensors)}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return hashes


def _write_shard(path: Path, tensors: Mapping[str, Placed]) -> dict[str, str]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, placed in tensors.items():
        info, size = placed.info, placed.info.end - placed.info.begin
        offsets = [at, at + size]
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hashes = {}
    with path.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for name, placed in tensors.items():
            digest = hashlib.sha256()
            with placed.file.open("rb") as source:
                for piece in pieces(source, placed.info):
                    digest.update(piece)
                    target.write(piece)
            hashes[name] = digest.hexdigest()
    return hashes


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a model folder."""
    found = {}
    for path in weight_files(folder):
        with path.open("rb") as file:
            for name, info in read_header(file, str(path)).items():
                digest = hashlib.sha256()
                for piece in pieces(file, info):
                    digest.update(piece)
                found[name] = digest.hexdigest()
    return found


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
