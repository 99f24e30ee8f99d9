"""The contract of an encoder: a frozen model that makes features of the items of one modality.

    item (bytes) ─► load ─► a tensor ─► encode, in batches ─► features [n, d_v] and which are there

An encoder is one file in this folder with one subclass of `Encoder`; its defaults stand in
``conf/encoder/``. It is frozen whatever a trainer asks for, and its features are no part of any
gradient. Who it is, its fingerprint, is told without torch (`cfm_train.modality.finding`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn


class Encoder(nn.Module, ABC):
    """Base class of all encoders.

    Subclasses have an annotated ``__init__`` without defaults; the values stand in their YAML.

    Attributes:
        modality: what its items are called: the key of a row, ``<modality>`` in a prompt.
        width: how many numbers a feature vector has, d_v; known after `build`.
        fingerprint: who it is: kind, parameters and weights, 64 hexadecimal digits.
    """

    modality: str = "image"
    width: int
    fingerprint: str = ""

    @abstractmethod
    def build(self, folder: Path | None) -> Self:
        """Reads the weights.

        Args:
            folder: where they lie; None for an encoder without.

        Raises:
            UserError: they are not what this encoder reads.
        """

    @abstractmethod
    def load(self, content: bytes, at: str) -> Tensor:
        """One item as the tensor that `features` reads.

        Args:
            content: the item's bytes.
            at: where it stands, for the error sentence.

        Raises:
            UserError: it is no item of this modality.
        """

    @abstractmethod
    def features(self, items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Features of loaded items, see `encode`."""

    @torch.no_grad()
    def encode(self, items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Features of some items, with no gradient.

        Args:
            items: what `load` gave.

        Returns:
            Features float32 ``[items, n, width]`` and which of them are there, bool ``[items, n]``
            (items of another length are padded).
        """
        features, mask = self.features([item.to(self.device) for item in items])
        return features.float(), mask

    def freeze(self) -> Self:
        """No gradients, eval mode."""
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, whatever a trainer asks for."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where its weights are; the CPU where it has none."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))


def padded(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Features of different lengths ``[n_i, width]`` as one batch, and which of them are there."""
    features = nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    lengths = torch.tensor([len(part) for part in parts], device=features.device)
    steps = torch.arange(features.shape[1], device=features.device)
    return features, steps[None, :] < lengths[:, None]
