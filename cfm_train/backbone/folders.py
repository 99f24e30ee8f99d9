"""New backbone folders: laid out in shards, written aside, and there only when they are whole.

with written_aside(out) as folder:
    ...                               # write weights, config, tokenizer into folder
                                      # flushed, and renamed to out, unless something is raised
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cfm_train.backbone.fingerprint import tokenizer_files
from cfm_train.errors import UserError
from cfm_train.library.tensorfile import BITS, TensorInfo

#: Kept free on the disk beside what is written.
SPARE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Shard:
    """A weight file to be written.

    Attributes:
        name: the file's name.
        header: its first bytes.
        tensors: where each tensor goes, in the order of the bytes.
        size: bytes of the whole file.
    """

    name: str
    header: bytes
    tensors: dict[str, TensorInfo]
    size: int


def look_at(out: Path, note: str, text: str) -> bool:
    """Whether a folder holds this very backbone already: its note says so.

    Args:
        out: the folder to write.
        note: name of the file that tells what the backbone was made from.
        text: what that file is to say.

    Raises:
        UserError: something else is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    there = out / note
    if there.is_file() and there.read_text(encoding="utf-8") == text:
        return True
    raise UserError(f"out: {out} is there already: choose a new folder, or delete it.")


def check_room(out: Path, needed: int, what: str) -> None:
    """Refuses a folder whose disk has no room, or that may not be written.

    Args:
        out: the folder to write.
        needed: bytes.
        what: what is written, for the error sentence.

    Raises:
        UserError: with what is free and what is needed.
    """
    there = next(parent for parent in out.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"out: cannot write into {there}; choose another folder with out=DIR.")
    free = shutil.disk_usage(there).free
    if free < needed + SPARE_BYTES:
        raise UserError(
            f"out: the disk of {there} has {free / 2**20:.0f} MB free, and {what} needs "
            f"{(needed + SPARE_BYTES) / 2**20:.0f}: make room or choose another out=DIR."
        )


def lay_out(
    tensors: Mapping[str, tuple[str, Sequence[int]]], shard_bytes: int
) -> tuple[list[Shard], dict[str, str]]:
    """Which tensor goes where: a function of names, dtypes and shapes alone.

    Args:
        tensors: name -> dtype (safetensors' word) and shape.
        shard_bytes: most bytes of one weight file.

    Returns:
        The weight files, and further files by name (the index of several weight files).
    """

    def size(name: str) -> int:
        count = BITS[tensors[name][0]]
        for width in tensors[name][1]:
            count *= width
        return count // 8

    # Widest elements first, then by name: so every tensor begins at a multiple of its element.
    order = sorted(tensors, key=lambda name: (-BITS[tensors[name][0]], name))
    parts: list[list[str]] = [[]]
    filled = 0
    for name in order:
        if parts[-1] and filled + size(name) > shard_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size(name)
    shards: list[Shard] = []
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        file = file if len(parts) > 1 else "model.safetensors"
        shards.append(_shard(file, {n: (*tensors[n], size(n)) for n in names}))
        weight_map |= dict.fromkeys(names, file)
    if len(parts) == 1:
        return shards, {}
    index = {"metadata": {"total_size": sum(map(size, order))}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    return shards, {"model.safetensors.index.json": text}


def _shard(file: str, tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> Shard:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text) + 8
    infos, place = {}, start
    for name, (dtype, shape, size) in tensors.items():
        infos[name] = TensorInfo(name, dtype, tuple(shape), place, place + size)
        place += size
    return Shard(file, len(text).to_bytes(8, "little") + text, infos, start + at)


@contextlib.contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that becomes ``out`` when all went well, and is gone if not.

    Args:
        out: the folder; it must not exist, or be empty.
    """
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    made = [parent for parent in out.parents if not parent.exists()]
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in aside.iterdir():
            flush(path)
        if out.is_dir():
            out.rmdir()  # an empty folder that the person made for it
        os.rename(aside, out)
        flush(out.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise


def write_around(folder: Path, companion: Path, texts: Mapping[str, str]) -> None:
    """Everything but the weights.

    Args:
        folder: the folder to write into.
        companion: the backbone folder whose tokenizer and generation config are copied.
        texts: further files, such as ``config.json``.
    """
    for path in tokenizer_files(companion):
        shutil.copyfile(path, folder / path.name)
    if (companion / "generation_config.json").is_file():
        shutil.copyfile(companion / "generation_config.json", folder / "generation_config.json")
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
