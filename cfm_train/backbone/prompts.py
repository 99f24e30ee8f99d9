"""The embedding port: virtual tokens in front of a stack's input, and the positions they take.

A soft prompt lengthens the sequence, which no hook on one layer can do. The slot therefore sits on
the stack itself (the module that owns the embedding): before it runs, token ids become embeddings with
the virtual ones in front, and mask and positions grow with them; after it, the virtual positions are
taken off the hidden states, so that callers see the shapes they asked for. While a cache is being
filled token by token, the virtual ones are already in it: only mask and positions move.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cfm_train.backbone.sites import Site, SiteMap
from cfm_train.errors import UserError


class PromptSlot:
    """The embedding ports of a model, one for each stack.

    Args:
        model: the transformers model.
        sites: its sites; a stack is the nearest module above an `embed` site that takes ``input_ids``.
    """

    def __init__(self, model: nn.Module, sites: SiteMap) -> None:
        self._model = model
        self.prompts: list[tuple[Site, Tensor, float | Tensor | None]] = []
        self.shifts: dict[str, int] = {}

    def clear(self) -> None:
        """Takes every virtual token out."""
        self.prompts, self.shifts = [], {}

    def add(self, site: Site, embeddings: Tensor, weight: float | Tensor | None) -> None:
        """Puts virtual tokens ``[tokens, hidden]`` in front of the stack that ``site`` embeds for."""
        self.prompts.append((site, embeddings, weight))

    def shift_positions(self, site: str, tokens: int, weight: float | Tensor | None) -> None:
        """Moves real tokens up by ``tokens`` positions, for keys and values plugged in front."""
        self.shifts[site] = self.shifts.get(site, 0) + tokens
