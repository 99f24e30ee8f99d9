"""Patches of a series as they are: an encoder without weights (the input of PatchTST, 2023).

    [steps, channels] ─► each channel less its mean, by its deviation
                      ─► patches of ``patch`` steps, every ``stride``
                      ─► vectors: a patch of all channels, and of each channel the mean (as asinh)
                         and the deviation (as its logarithm) that were taken away

Nie et al. 2023 (arXiv 2211.14730) normalise each series for itself, so that patches show a shape
whatever its height; height and spread stand beside it here, for a language model to tell of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from cfm_train.config.types import Positive
from cfm_train.modality.encoders.encoder import Encoder, padded
from cfm_train.modality.fitting import check_stride
from cfm_train.modality.series import read_series

#: The deviation that a channel without any has.
FLOOR = 1e-5


class Series(Encoder):
    """Patches of a series.

    Args:
        channels: numbers of each step.
        patch: steps of a patch; the last value fills up a series that ends within one.
        stride: steps from one patch to the next.
    """

    modality = "series"

    def __init__(self, channels: Positive, patch: Positive, stride: Positive) -> None:
        super().__init__()
        check_stride(patch, stride)
        self.channels, self.patch, self.stride = channels, patch, stride

    def build(self, folder: Path | None) -> Self:
        """Nothing to read."""
        self.width = self.channels * (self.patch + 2)
        return self

    def load(self, content: bytes, at: str) -> Tensor:
        """The series, float32 ``[steps, channels]``."""
        return torch.from_numpy(read_series(content, at, self.channels))

    def features(self, items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Patches ``[items, n, channels · (patch + 2)]``; n grows with the length of a series."""
        parts = []
        for item in items:
            series = item.double()
            mean = series.mean(dim=0)
            deviation = series.std(dim=0, correction=0).clamp_min(FLOOR)
            shape = ((series - mean) / deviation).T  # [channels, steps]
            behind = -(-max(0, len(item) - self.patch) // self.stride)
            lacking = self.patch + behind * self.stride - len(item)
            shape = torch.cat([shape, shape[:, -1:].expand(-1, lacking)], dim=1)
            patches = shape.unfold(1, self.patch, self.stride).transpose(0, 1).flatten(1)
            level = torch.cat([mean.asinh(), deviation.log()]).expand(len(patches), -1)
            parts.append(torch.cat([patches, level], dim=1).float())
        return padded(parts)
