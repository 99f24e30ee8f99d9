"""Writes a backbone tensor by tensor: bytes go from file to file, a few megabytes at a time.

Nothing is decoded, so values stay what they are to the last bit, and memory does not grow with the
model. The folder is written aside and renamed, so it is whole or not there; then every tensor is
read again and its SHA-256 compared with that of its source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from cfm_train.backbone.folders import Shard, lay_out, write_around, written_aside
from cfm_train.backbone.spec import weight_files
from cfm_train.backbone.tensors import Placed
from cfm_train.library.tensorfile import pieces, read_header


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
    shards, index = lay_out(
        {name: (p.info.dtype, p.info.shape) for name, p in tensors.items()}, shard_bytes
    )
    with written_aside(out) as folder:
        hashes: dict[str, str] = {}
        for shard in shards:
            hashes |= _write_shard(folder / shard.name, shard, tensors)
        write_around(folder, companion, {**index, **texts})
        return _hashes(folder) == hashes


def _write_shard(path: Path, shard: Shard, tensors: Mapping[str, Placed]) -> dict[str, str]:
    """Writes one weight file; the SHA-256 of each tensor's source."""
    hashes = {}
    with path.open("wb") as target:
        target.write(shard.header)
        for name in shard.tensors:
            digest = hashlib.sha256()
            with tensors[name].file.open("rb") as source:
                for piece in pieces(source, tensors[name].info):
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
