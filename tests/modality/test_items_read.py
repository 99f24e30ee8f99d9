"""Items as they are read from their bytes: images to the bit, arrays, and what is neither."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

from cfm_train.errors import UserError
from cfm_train.modality.finding import find_encoder
from cfm_train.modality.images import read_image


def test_what_is_no_array_is_said_so() -> None:
    encoder = find_encoder({"kind": "vectors", "numbers": 2}).open()
    with pytest.raises(UserError, match=r"^here: is no \.npy file; write one"):
        encoder.load(b"[[1,2]]", "here")


def test_png_of_every_filter_is_read_to_the_bit() -> None:
    """Written here by RFC 2083's five filters, one after the other."""
    import struct
    import zlib

    pixels = np.random.default_rng(0).integers(0, 256, (10, 7, 3)).astype(np.uint8)
    data, above = b"", np.zeros(21, int)
    for y, line in enumerate(pixels.reshape(10, 21).astype(int)):
        left = np.concatenate([[0, 0, 0], line[:-3]])
        corner = np.concatenate([[0, 0, 0], above[:-3]])
        guess = left + above - corner
        far = np.abs(np.stack([left, above, corner]) - guess)
        paeth = np.stack([left, above, corner])[far.argmin(axis=0), np.arange(21)]
        what = (np.zeros(21, int), left, above, (left + above) // 2, paeth)[y % 5]
        data += bytes([y % 5]) + ((line - what) % 256).astype(np.uint8).tobytes()
        above = line
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 7, 10, 8, 2, 0, 0, 0)),
             (b"IDAT", zlib.compress(data)), (b"IEND", b"")]  # fmt: skip
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )
    np.testing.assert_array_equal(read_image(png, "here"), pixels)
    with pytest.raises(UserError, match=r"a\.jpg: is no image that can be read"):
        read_image(b"\xff\xd8\xff\xe0 broken", "a.jpg")


def test_images_are_read_as_pillow_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """PNG in all its colour types by value, JPEG by way of Pillow; without it, what to install."""
    pillow = pytest.importorskip("PIL.Image")
    grey = np.random.default_rng(1).integers(0, 256, (9, 5)).astype(np.uint8)
    colour = np.random.default_rng(2).integers(0, 256, (9, 5, 4)).astype(np.uint8)
    for made in (
        pillow.fromarray(grey), pillow.fromarray(colour[:, :, :3]), pillow.fromarray(colour),
        pillow.fromarray(colour[:, :, :3]).convert("P"), pillow.fromarray(grey).convert("LA"),
    ):  # fmt: skip
        stream = io.BytesIO()
        made.save(stream, "PNG")
        np.testing.assert_array_equal(
            read_image(stream.getvalue(), "here"), np.asarray(made.convert("RGB"))
        )
    stream = io.BytesIO()
    pillow.fromarray(colour[:, :, :3]).save(stream, "JPEG")
    expected = np.asarray(pillow.open(io.BytesIO(stream.getvalue())).convert("RGB"))
    np.testing.assert_array_equal(read_image(stream.getvalue(), "here"), expected)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(UserError, match=r"pip install 'cfm_train\[vision\]'"):
        read_image(stream.getvalue(), "a.jpg")
