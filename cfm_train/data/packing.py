"""Packing: whole pieces of text into blocks of a fixed size, by best-fit decreasing (Johnson 1974).

It needs at most 11/9 of the fewest possible blocks, plus one, and no piece is cut for it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Pieces into as few blocks as best-fit decreasing finds.

    Args:
        sizes: tokens of each piece, each at most ``capacity``.
        capacity: tokens of a block.

    Returns:
        The pieces of each block, by number, in their order; the blocks by their first piece.
    """
    room: list[list[int]] = [[] for _ in range(capacity + 1)]  # free tokens -> blocks
    free: list[int] = []  # the amounts of free tokens that some block has, sorted
    blocks: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect.bisect_left(free, sizes[i])
        if at < len(free):
            left = free[at]
            block = room[left].pop()
            if not room[left]:
                free.pop(at)
        else:
            left, block = capacity, len(blocks)
            blocks.append([])
        blocks[block].append(i)
        left -= sizes[i]
        if left > 0:
            if not room[left]:
                bisect.insort(free, left)
            room[left].append(block)
    return sorted(sorted(block) for block in blocks)
