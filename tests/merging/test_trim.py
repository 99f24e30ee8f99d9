"""The trim of a long update, piece by piece, against the mask of the whole of it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cfm_train.merging.models import trim
from cfm_train.merging.sparsify.sparsifier import largest

#: Numbers that tie often, in bins that lie close, with zeros, tiny and huge ones.
NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0000001, 1.001, -1.001, 3e38, -1e-42, 0.5])


def by_pieces(update: Tensor, keep: int, size: int) -> Tensor:
    """The update trimmed a piece at a time."""
    pieces = update.clone().split(size)
    counts = torch.zeros(trim.BINS, dtype=torch.int64)
    upper = []
    for piece in pieces:
        high = torch.empty(len(piece), dtype=torch.int32)
        trim.high_bits(piece.clone(), high)
        upper.append(high)
        counts += trim.histogram(high)
    where = trim.place(counts, keep)
    lows = [trim.low_bits(p.abs(), h, where) for p, h in zip(pieces, upper, strict=True)]
    cut = trim.cut(where, lows)
    for piece, before in zip(pieces, cut.before, strict=True):
        seen = before
        for part in piece.split(3):  # chunks of a piece
            seen = trim.trim(part, cut, seen)
    return torch.cat(pieces)


@settings(max_examples=150, deadline=None)
@given(st.lists(NUMBERS | st.floats(-2, 2, width=32), min_size=1, max_size=40), st.data())
def test_the_same_numbers_stay(numbers: list[float], data: st.DataObject) -> None:
    update = torch.tensor(numbers, dtype=torch.float32)
    keep = data.draw(st.integers(1, len(numbers)))
    size = data.draw(st.integers(1, len(numbers)))
    expected = update * largest(update.abs(), keep)
    assert torch.equal(by_pieces(update, keep, size), expected)
