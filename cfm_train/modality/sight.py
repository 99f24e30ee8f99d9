"""What the tokens of a pass may look at, where items are looked at from inside the layers.

    marks among the ids   [ .  *  .  .  *  . ]      *: the mark of an item
    items before          [ 0  1  1  1  2  2 ]      each token looks at that many of its row's items

A pass that goes on from a cache has its marks behind it: what its row has seen is kept. Virtual
tokens in front of a row (soft prompts) look at nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfm_train.backbone.virtual import spread


class Sight:
    """The items of the pass that runs.

    Attributes:
        latents: ``[items, tokens, inner]``, those of all rows behind each other; set where items
            are read; None before.
    """

    def __init__(self) -> None:
        self.latents: Tensor | None = None
        self._items: list[int] = []
        self._before: Tensor | None = None

    def look(self, here: Tensor | None, past: int, items: list[int], size: int) -> None:
        """Notes a pass that begins.

        Args:
            here: bool ``[rows, seq]``, where the ids are marks; None for a pass without ids.
            past: tokens in the cache that the pass goes on from.
            items: how many items each row of the batch has.
            size: places of an item's mark (three with a tag on each side).
        """
        self._items = items
        known = self._before if past and self._before is not None else None
        if here is None or not sum(items):
            self._before = None
            return
        before = (here.long().cumsum(dim=1) + size - 1) // size
        if known is not None:
            before = before + spread(known[:, -1:], len(before)).to(before.device)
        self._before = before if bool((before > 0).any()) else None

    def of(self, rows: int, length: int) -> tuple[Tensor, Tensor] | None:
        """Latents of each row, and which each token looks at; None where nothing is looked at.

        Args:
            rows: of the hidden states, a multiple of the batch's where generation repeats them.
            length: of the hidden states, virtual tokens in front included.

        Returns:
            ``[rows, m, inner]`` and bool ``[rows, length, m]``.
        """
        if self._before is None or self.latents is None:
            return None
        tokens = self.latents.shape[1]
        parts = list(self.latents.flatten(0, 1).split([n * tokens for n in self._items]))
        held = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        number = torch.arange(held.shape[1], device=held.device) // tokens  # of the item in its row
        there = torch.tensor(self._items, device=held.device)[:, None] > number
        before = spread(self._before.to(held.device), rows)
        front = length - before.shape[1]
        before = F.pad(before, (front, 0))
        held, there = spread(held, rows), spread(there, rows)
        return held, (before[..., None] > number) & there[:, None]
