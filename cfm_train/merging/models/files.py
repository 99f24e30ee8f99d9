"""Numbers in and out of weight files, a piece at a time: no file is ever in memory as a whole."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from cfm_train.backbone.folders import Shard
from cfm_train.backbone.tensors import Placed
from cfm_train.errors import UserError

#: safetensors' words for the dtypes that are merged.
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
#: Numbers that are read at once: few enough that they and what is made of them stay in cache, so
#: many that an operation on them takes longer than two threads take to hand Python to each other.
CHUNK = 1 << 18


class _Files:
    """Open files, closed at the end of a ``with``."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for handle in self._handles.values():
            os.close(handle)


class Reader(_Files):
    """Reads from many files, from any number of threads.

    Pieces are copied out of the file by `os.preadv`, not mapped: memory is what the buffers are,
    whatever the size of the model, and a tensor may begin at any byte.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._own = threading.local()

    def read(self, placed: Placed, start: int, into: Tensor) -> None:
        """Reads numbers of a tensor.

        Args:
            placed: the tensor.
            start: the first number, counted in the flat tensor.
            into: ``[n]`` contiguous, of any floating-point dtype; filled.

        Raises:
            UserError: the file has changed since its header was read.
        """
        dtype = DTYPES[placed.info.dtype]
        for at in range(0, len(into), CHUNK):
            part = into[at : at + CHUNK]
            raw = self._bytes(len(part) * dtype.itemsize)
            self._fill(placed, placed.info.begin + (start + at) * dtype.itemsize, raw)
            part.copy_(raw.view(dtype))

    def _bytes(self, count: int) -> Tensor:
        if not hasattr(self._own, "raw"):
            self._own.raw = torch.empty(CHUNK * 8, dtype=torch.uint8)
        raw: Tensor = self._own.raw[:count]
        return raw

    def _fill(self, placed: Placed, offset: int, raw: Tensor) -> None:
        handle, view, done = self._handle(placed.file), memoryview(raw.numpy().data), 0
        while done < len(view):
            got = os.preadv(handle, [view[done:]], offset + done)
            if not got:
                raise UserError(
                    f"Tensor '{placed.info.name}' ends early: {placed.file} was changed while it "
                    "was read."
                )
            done += got

    def _handle(self, path: Path) -> int:
        with self._lock:
            if path not in self._handles:
                self._handles[path] = os.open(path, os.O_RDONLY)
            return self._handles[path]


class Writer(_Files):
    """New weight files, written from any number of threads, in any order.

    Args:
        folder: where to.
        shards: the files, as `cfm_train.backbone.folders.lay_out` laid them out.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        super().__init__()
        self.places: dict[str, tuple[int, int]] = {}
        self.sizes: dict[str, int] = {}
        for shard in shards:
            handle = os.open(folder / shard.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            self._handles[folder / shard.name] = handle
            os.ftruncate(handle, shard.size)
            os.pwrite(handle, shard.header, 0)
            self.places |= {name: (handle, info.begin) for name, info in shard.tensors.items()}
            self.sizes |= {name: info.end - info.begin for name, info in shard.tensors.items()}

    def write(self, name: str, start: int, numbers: Tensor) -> None:
        """Writes numbers of a tensor.

        Args:
            name: the tensor.
            start: the first number, counted in the flat tensor.
            numbers: ``[n]`` contiguous, in the dtype of the file.
        """
        self.write_bytes(
            name, start * numbers.element_size(), numbers.view(torch.uint8).numpy().data
        )

    def write_bytes(self, name: str, offset: int, content: bytes | memoryview) -> None:
        """Writes bytes of a tensor, ``offset`` bytes after its first."""
        handle, begin = self.places[name]
        view, done = memoryview(content), 0
        while done < len(view):
            done += os.pwrite(handle, view[done:], begin + offset + done)

    def repeat(self, name: str, other: str) -> None:
        """Writes the bytes of a tensor that is complete once more, as another one's."""
        handle, begin = self.places[name]
        left, at = self.sizes[name], 0
        while left:
            piece = os.pread(handle, min(left, CHUNK * 8), begin + at)
            self.write_bytes(other, at, piece)
            at, left = at + len(piece), left - len(piece)


def numbers_in(placed: Placed) -> int:
    """How many numbers a tensor has."""
    return placed.size // DTYPES[placed.info.dtype].itemsize
