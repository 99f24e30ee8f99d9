"""Safetensors files in a few lines of our own: header, pieces of tensors, values not finite.

The header is parsed here, not by a library, so that a wrong file is refused with a sentence before
any other code sees it, and so that bfloat16 needs no torch. The format
(https://huggingface.co/docs/safetensors): eight bytes with the header's length, a JSON header with
dtype, shape and offsets of each tensor, then the bytes of all tensors without a gap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from cfm_train.errors import UserError

if TYPE_CHECKING:
    import numpy as np

#: Bits of one element of each dtype that safetensors knows.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

_NUMPY = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4",
    "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
#: What the first bytes of pickles are: torch's zip archive, and the pickle protocols 2 to 5.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_HEADER_LIMIT = 100_000_000
_PIECE = 1 << 22  # divides by the size of every element


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in its file: ``begin`` and ``end`` count from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: IO[bytes], where: str) -> dict[str, TensorInfo]:
    """Parses and checks the header of a safetensors file.

    Args:
        file: the file, open for reading, seekable.
        where: what to call it in the error sentence.

    Returns:
        The tensors by name, in the order of their bytes.

    Raises:
        UserError: the file is truncated, is something else, or its offsets do not add up.
    """
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(8)
    # Read as a header's length, the first bytes of a pickle are far more than any file has.
    length = int.from_bytes(start, "little")
    if start.startswith(_PICKLE_STARTS) and length > size:
        raise UserError(
            f"{where} is a pickle, whatever its name says, and could run code when loaded: save "
            "the tensors as safetensors."
        )
    if len(start) < 8:
        raise _unsound(where, f"{size} bytes are too few for a header")
    if length > min(size - 8, _HEADER_LIMIT):
        raise _unsound(
            where, f"it announces a header of {length} bytes and has {size} in all (truncated?)"
        )
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _unsound(where, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _unsound(where, "its header is no JSON object")
    header.pop("__metadata__", None)
    tensors = [_tensor(name, entry, 8 + length, where) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    reached = 8 + length
    for tensor in tensors:
        if tensor.begin != reached:
            what = "overlaps another" if tensor.begin < reached else "has a gap before it"
            raise _unsound(where, f"tensor '{tensor.name}' {what}")
        reached = tensor.end
    if reached > size:
        raise _unsound(where, f"its last {reached - size} bytes are missing (truncated?)")
    if reached < size:
        raise _unsound(where, f"{size - reached} bytes follow its last tensor")
    return {tensor.name: tensor for tensor in tensors}


def _tensor(name: str, entry: Any, data: int, where: str) -> TensorInfo:
    """Checks one entry of the header; ``data`` is where the tensors' bytes begin."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _unsound(where, f"tensor '{name}' lacks dtype, shape or offsets") from None
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _unsound(where, f"tensor '{name}' has the unknown dtype {dtype!r}")
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise _unsound(where, f"tensor '{name}' has a shape or an offset that is no whole number")
    needed = math.prod(shape) * BITS[dtype]
    if (end - begin) * 8 != needed:
        raise _unsound(where, f"tensor '{name}' has {end - begin} bytes and needs {needed // 8}")
    return TensorInfo(name, dtype, shape, data + begin, data + end)


def _unsound(where: str, what: str) -> UserError:
    return UserError(f"{where} is no sound safetensors file: {what}; write or fetch it again.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name stands in it twice")
    return values


def pieces(file: IO[bytes], tensor: TensorInfo) -> Iterator[bytes]:
    """The bytes of one tensor, a few megabytes at a time: backbones are artifacts too."""
    file.seek(tensor.begin)
    left = tensor.end - tensor.begin
    while left:
        piece = file.read(min(left, _PIECE))
        if not piece:
            raise UserError(
                f"Tensor '{tensor.name}' ends early: its file was changed while it was read."
            )
        left -= len(piece)
        yield piece


def check_finite(file: IO[bytes], tensor: TensorInfo, where: str) -> None:
    """Refuses a tensor with a NaN or an infinity in it.

    Raises:
        UserError: with the tensor's name and how many of its values are affected.
    """
    bad = sum(_not_finite(piece, tensor.dtype) for piece in pieces(file, tensor))
    if bad:
        raise UserError(
            f"{where}: {bad} of the values of tensor '{tensor.name}' are NaN or infinite: its "
            "training diverged or the file is damaged; train with a lower learning rate or fetch "
            "the file again."
        )


def _not_finite(piece: bytes, dtype: str) -> int:
    """How many elements are NaN or infinite: all exponent bits set, in each format's own way."""
    import numpy as np

    if dtype in ("F16", "F32", "F64", "C64"):
        return int((~np.isfinite(np.frombuffer(piece, _NUMPY[dtype]))).sum())
    if dtype == "BF16":
        return int(((np.frombuffer(piece, "<u2") & 0x7F80) == 0x7F80).sum())
    if dtype == "F8_E5M2":
        return int(((np.frombuffer(piece, "u1") & 0x7C) == 0x7C).sum())
    if dtype == "F8_E4M3":  # the variant without infinities: only all ones is NaN
        return int(((np.frombuffer(piece, "u1") & 0x7F) == 0x7F).sum())
    if dtype == "F8_E8M0":
        return int((np.frombuffer(piece, "u1") == 0xFF).sum())
    return 0


def to_numpy(file: IO[bytes], tensor: TensorInfo, where: str) -> np.ndarray:
    """One tensor as an array of its own; bfloat16 as float32 of the same values.

    Raises:
        UserError: the dtype is one that NumPy lacks.
    """
    import numpy as np

    content = bytearray(b"".join(pieces(file, tensor)))
    if tensor.dtype == "BF16":  # the upper half of a float32
        array = (np.frombuffer(content, "<u2").astype("<u4") << 16).view("<f4")
    elif tensor.dtype in _NUMPY:
        array = np.frombuffer(content, _NUMPY[tensor.dtype])
    else:
        raise UserError(
            f"{where}: NumPy has no {tensor.dtype} for tensor '{tensor.name}': read it with torch."
        )
    return array.reshape(tensor.shape)
