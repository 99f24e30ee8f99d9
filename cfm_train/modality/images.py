"""Images from bytes: PNG and NumPy arrays are read here, everything else through Pillow."""

from __future__ import annotations

import importlib
import io
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

from cfm_train.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_PNG = b"\x89PNG\r\n\x1a\n"
#: Channels of the colour types of PNG that are read here: grey, RGB, palette, grey and RGB with
#: alpha.
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def read_image(content: bytes, at: str) -> np.ndarray:
    """An image as RGB, uint8 ``[height, width, 3]``; transparency is left out, as Pillow does.

    Args:
        content: the file's bytes: PNG, ``.npy`` (uint8, grey or RGB), or what Pillow reads.
        at: where it stands, for the error sentence.

    Raises:
        UserError: it is damaged, or of a format that needs Pillow where that is not installed.
    """
    try:
        if content.startswith(b"\x93NUMPY"):
            return _rgb(np.load(io.BytesIO(content), allow_pickle=False))
        found = _png(content) if content.startswith(_PNG) else None
        return _pillow(content, at) if found is None else _rgb(found)
    except UserError:
        raise
    except Exception as error:
        # Decoders raise whatever comes to them with broken bytes.
        why = "unknown format" if type(error).__name__ == "UnidentifiedImageError" else error
        raise UserError(f"{at}: is no image that can be read ({why}).") from None


def as_tensor(image: np.ndarray) -> Tensor:
    """uint8 ``[height, width, 3]`` as float32 ``[3, height, width]`` between 0 and 1."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255


def _rgb(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(f"an array is uint8 [height, width, 3], found {image.dtype} {image.shape}")
    image = image[:, :, None] if image.ndim == 2 else image
    if image.shape[2] in (1, 2):
        return np.repeat(image[:, :, :1], 3, axis=2)
    return image[:, :, :3]


def _pillow(content: bytes, at: str) -> np.ndarray:
    try:
        pillow = importlib.import_module("PIL.Image")
    except ImportError:
        raise UserError(
            f"{at}: only PNG and .npy images can be read without Pillow: pip install "
            "'cfm_train[vision]'."
        ) from None
    with pillow.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def _png(content: bytes) -> np.ndarray | None:
    """A PNG of 8 bits, not interlaced, uint8 ``[height, width, channels]``; None for others.

    The format and its five filters: RFC 2083.
    """
    at, data, palette = len(_PNG), bytearray(), b""
    header: tuple[int, ...] = ()
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            header = struct.unpack(">IIBBBBB", body)
        elif kind == b"PLTE":
            palette = body
        elif kind == b"IDAT":
            data += body
        at += length + 12
    width, height, depth, colour, _, _, interlaced = header
    if depth != 8 or interlaced:
        return None
    channels = _CHANNELS[colour]
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(height, 1 + width * channels)
    image = _unfiltered(rows, channels).reshape(height, width, channels)
    if colour == 3:
        return np.frombuffer(palette, np.uint8).reshape(-1, 3)[image[:, :, 0]]
    return image


def _unfiltered(rows: np.ndarray, channels: int) -> np.ndarray:
    """The bytes of the rows before the encoder's filters, uint8 ``[height, width · channels]``."""
    out = np.zeros((len(rows) + 1, rows.shape[1] - 1), np.uint8)
    for y, row in enumerate(rows, start=1):
        kind, line, above = int(row[0]), row[1:], out[y - 1]
        if kind == 0:
            out[y] = line
        elif kind == 2:
            out[y] = line + above
        elif kind == 1:  # what lies to the left is added up, channel by channel
            summed = np.cumsum(line.reshape(-1, channels), axis=0, dtype=np.uint32)
            out[y] = summed.astype(np.uint8).reshape(-1)
        else:
            out[y] = _by_byte(kind, line, above, channels)
    return out[1:]


def _by_byte(kind: int, line: np.ndarray, above: np.ndarray, channels: int) -> np.ndarray:
    """The filters Average (3) and Paeth (4), which need each byte's left neighbour."""
    if kind not in (3, 4):
        raise ValueError(f"PNG knows no filter {kind}")
    out = [0] * len(line)
    values, up = line.tolist(), above.tolist()
    for i, value in enumerate(values):
        a = out[i - channels] if i >= channels else 0
        b = up[i]
        if kind == 3:
            guess = (a + b) // 2
        else:
            c = up[i - channels] if i >= channels else 0
            pa, pb, pc = abs(b - c), abs(a - c), abs(a + b - 2 * c)
            guess = a if pa <= pb and pa <= pc else b if pb <= pc else c
        out[i] = (value + guess) & 255
    return np.array(out, np.uint8)
