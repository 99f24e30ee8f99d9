"""Nothing is dropped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cfm_train.merging.sparsify.sparsifier import Sparsifier


class Nothing(Sparsifier):
    """Keeps every number."""

    elementwise = True

    def sparsify(self, updates: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The updates as they are."""
        return updates
