"""The exact trim of a long update that is seen a piece at a time: which numbers are the largest.

The magnitude of the k-th largest number is found as radix selection finds it, in two passes of
O(n): the upper sixteen bits of a float32 magnitude (a bfloat16) name one of 32768 bins, and a
histogram tells in which the k-th lies; of the numbers in that bin the lower sixteen bits decide.
Bits of magnitudes are ordered like the magnitudes, so nothing is rounded.

Numbers as large as the threshold are kept from the first on until k are kept: the rule of
`sparsify.sparsifier.largest`, which sees a whole update at once, and the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: How many bins upper bits make.
BINS = 1 << 15
_LOW = 1 << 16


#: Lower bits, ascending, and how often each occurs.
Counts = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Place:
    """Where the threshold lies: a bin of upper bits, and how many of its numbers are kept."""

    high: int
    keep: int


@dataclass(frozen=True)
class Cut:
    """What is kept of an update.

    Attributes:
        threshold: the magnitude of the smallest number that is kept.
        below: the largest float32 below it.
        equal: how many numbers of that very magnitude are kept.
        before: for each piece, how many of them lie in the pieces before it.
    """

    threshold: float
    below: float
    equal: int
    before: list[int]


def high_bits(update: Tensor, out: Tensor) -> None:
    """The upper bits of magnitudes.

    Args:
        update: ``[n]`` float32; overwritten by its magnitudes.
        out: ``[n]`` int32, filled.
    """
    torch.bitwise_right_shift(update.abs_().view(torch.int32), 16, out=out)


def histogram(high: Tensor) -> Tensor:
    """How many numbers lie in each bin, int64 ``[32768]``, from upper bits ``[n]`` int32."""
    return torch.bincount(high, minlength=BINS)


def place(counts: Tensor, keep: int) -> Place:
    """The bin of the ``keep``-th largest number.

    Args:
        counts: the histogram of the whole update.
        keep: 1 to the number of all numbers.
    """
    above = counts.flip(0).cumsum(0)  # how many numbers lie in a bin or above it
    at = int((above < keep).sum())
    high = BINS - 1 - at
    return Place(high, keep - (int(above[at - 1]) if at else 0))


def low_bits(update: Tensor, high: Tensor, where: Place) -> Counts:
    """The lower bits of the numbers in a bin, and how often each occurs.

    Args:
        update: magnitudes ``[n]`` float32.
        high: their upper bits ``[n]`` int32.
        where: the bin.

    Returns:
        Values, ascending, and their counts.
    """
    inside = np.flatnonzero(high.numpy() == where.high)
    low = update.view(torch.int32).numpy()[inside] & (_LOW - 1)
    return np.unique(low, return_counts=True)


def joined(parts: Sequence[Counts]) -> Counts:
    """The counts of several parts as one."""
    if len(parts) == 1:
        return parts[0]
    values, where = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
    found = np.concatenate([part[1] for part in parts])
    return values, np.bincount(where, weights=found, minlength=len(values)).astype(np.int64)


def cut(where: Place, pieces: Sequence[Counts]) -> Cut:
    """The threshold, from the lower bits of every piece in order."""
    counts = np.zeros(_LOW, dtype=np.int64)
    for values, found in pieces:
        counts[values] += found
    above = counts[::-1].cumsum()
    at = int((above < where.keep).sum())
    low = _LOW - 1 - at
    before, seen = [], 0
    for values, found in pieces:
        before.append(seen)
        seen += int(found[values == low].sum())
    bits = np.array([(where.high << 16) | low], dtype=np.int32)
    threshold = bits.view(np.float32)[0]
    below = np.nextafter(threshold, np.float32(-1))
    return Cut(
        float(threshold), float(below), where.keep - (int(above[at - 1]) if at else 0), before
    )


def trim(update: Tensor, found: Cut, seen: int) -> int:
    """Sets to zero what is not kept of a part of an update.

    Args:
        update: ``[n]`` float32, changed in place.
        found: the cut.
        seen: how many numbers of the threshold's magnitude lie before this part.

    Returns:
        How many of them lie before the next part, as far as that still matters.
    """
    if seen >= found.equal:
        torch.ops.aten.hardshrink.out(update, found.threshold, out=update)
        return seen
    equal = np.flatnonzero(update.abs().numpy() == np.float32(found.threshold))
    torch.ops.aten.hardshrink.out(update, found.below, out=update)
    update[torch.from_numpy(equal[found.equal - seen :])] = 0.0
    return seen + len(equal)
