"""Features that were computed elsewhere: ``.npy`` files, as LiMBeR trains from."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from cfm_train.config.types import Positive
from cfm_train.errors import UserError
from cfm_train.modality.encoders.encoder import Encoder, padded


class Vectors(Encoder):
    """Given features.

    Args:
        numbers: how many each vector has.
    """

    modality = "features"

    def __init__(self, numbers: Positive) -> None:
        super().__init__()
        self.width = numbers

    def build(self, folder: Path | None) -> Self:
        """Nothing to read."""
        return self

    def load(self, content: bytes, at: str) -> Tensor:
        """An array ``[n, numbers]`` or ``[numbers]``, float32."""
        if not content.startswith(b"\x93NUMPY"):  # else NumPy takes it for a pickle, and says so
            raise UserError(f"{at}: is no .npy file; write one with numpy.save and name it here.")
        try:
            found = np.load(io.BytesIO(content), allow_pickle=False).astype(np.float32)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{at}: is no .npy file ({error}).") from None
        found = found[None] if found.ndim == 1 else found
        if found.ndim != 2 or found.shape[1] != self.width or not np.isfinite(found).all():
            raise UserError(
                f"{at}: features are finite numbers [n, {self.width}], found {found.shape}; "
                "encoder.numbers says how many each vector has."
            )
        return torch.from_numpy(found)

    def features(self, items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As they are, padded."""
        return padded(items)
