"""Sets of whole numbers as sorted (start, stop) ranges: how labels and rows are kept.

A projection of a large model has tens of thousands of output features, but the parts of a fused one
are a few ranges.
"""

from __future__ import annotations

from torch import Tensor

Ranges = tuple[tuple[int, int], ...]


def ranges_of(labels: Tensor | None) -> Ranges:
    """The numbers from 0 on that occur in an integer tensor (-1 stands for none)."""
    if labels is None:
        return ()
    found = labels.unique()
    found = found[found >= 0]
    if not found.numel():
        return ()
    breaks = (found.diff() > 1).nonzero().flatten()
    starts = [int(found[0]), *found[breaks + 1].tolist()]
    stops = [*(found[breaks] + 1).tolist(), int(found[-1]) + 1]
    return tuple(zip(starts, stops, strict=True))


def size(ranges: Ranges) -> int:
    """How many numbers there are."""
    return sum(stop - start for start, stop in ranges)


def clip(ranges: Ranges, low: int, high: int) -> Ranges:
    """The numbers from ``low`` to below ``high``."""
    return tuple((max(a, low), min(b, high)) for a, b in ranges if a < high and b > low)


def minus(ranges: Ranges, others: Ranges) -> Ranges:
    """The numbers that are not among ``others``."""
    for low, high in others:
        below, above = clip(ranges, 0, low), clip(ranges, high, 1 << 62)
        ranges = below + above
    return ranges


def shifted(ranges: Ranges, by: int) -> Ranges:
    """Every number plus ``by``."""
    return tuple((start + by, stop + by) for start, stop in ranges)
