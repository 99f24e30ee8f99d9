"""Patches of an image as they are: an encoder without weights (Fuyu, 2023, reads images so).

[3, size, size] ─► (size / patch)² patches ─► vectors of 3·patch² numbers between -1 and 1
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from cfm_train.config.types import Positive
from cfm_train.errors import UserError
from cfm_train.modality.encoders.encoder import Encoder
from cfm_train.modality.images import as_tensor, read_image


class Patches(Encoder):
    """Raw patches.

    Args:
        size: images are resized to ``size × size``.
        patch: side of a patch; divides the size.
    """

    def __init__(self, size: Positive, patch: Positive) -> None:
        super().__init__()
        if size % patch:
            raise UserError(f"encoder.size={size} is no multiple of encoder.patch={patch}.")
        self.size, self.patch = size, patch

    def build(self, folder: Path | None) -> Self:
        """Nothing to read."""
        self.width = 3 * self.patch**2
        return self

    def load(self, content: bytes, at: str) -> Tensor:
        """The image, float32 ``[3, size, size]`` between -1 and 1."""
        image = as_tensor(read_image(content, at))
        resized = F.interpolate(
            image[None], (self.size, self.size), mode="bilinear", antialias=True
        )
        return 2 * resized[0] - 1

    def features(self, items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The patches, row by row: ``[items, (size / patch)², 3·patch²]``."""
        found = F.unfold(torch.stack(list(items)), self.patch, stride=self.patch).transpose(1, 2)
        return found, torch.ones(found.shape[:2], dtype=torch.bool, device=found.device)
