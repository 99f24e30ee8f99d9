"""Anything importable that makes features: a function, or an nn.Module.

    encoder.target=package.module.function    called with an item, gives [n, numbers] or [numbers]

``reads`` says what it is called with: the item's ``bytes``, an ``image`` (uint8 [height, width, 3])
or a ``series`` (float32 [steps, channels]), as NumPy arrays for a function and as tensors for a
module. Who it is, its source and its weights tell (`cfm_train.modality.targets`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from cfm_train.config.types import Positive
from cfm_train.errors import UserError
from cfm_train.modality.encoders.encoder import Encoder, padded
from cfm_train.modality.images import read_image
from cfm_train.modality.series import read_series
from cfm_train.modality.targets import find_target, open_target


class Callable(Encoder):
    """A function or a module of a person's own.

    Args:
        target: ``package.module.name``.
        modality: what its items are called: the key of a row, ``<modality>`` in a prompt.
        reads: what it is called with.
        channels: of a series.
        numbers: how many each feature vector has.
    """

    def __init__(
        self,
        target: str,
        modality: str,
        reads: Literal["bytes", "image", "series"],
        channels: Positive,
        numbers: Positive,
    ) -> None:
        super().__init__()
        self.target, self.reads, self.channels = target, reads, channels
        self.modality = modality
        self.width = numbers

    def build(self, folder: Path | None) -> Self:
        """Imports the target.

        Raises:
            UserError: it cannot be imported, or is a module that is to read bytes.
        """
        made = open_target(find_target(self.target))
        if isinstance(made, nn.Module) and self.reads == "bytes":
            raise UserError(
                "encoder.reads=bytes is for functions: a module reads tensors, choose image or "
                "series."
            )
        # As an attribute of its own a module is frozen and moved with the encoder.
        self.made = made
        return self

    def load(self, content: bytes, at: str) -> Tensor:
        """What the target is called with; of a function already its features."""
        given: Any = content
        if self.reads == "image":
            given = read_image(content, at)
        elif self.reads == "series":
            given = read_series(content, at, self.channels)
        if isinstance(self.made, nn.Module):
            return torch.from_numpy(np.ascontiguousarray(given))
        return self._called(given, at)

    def features(self, items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Features ``[items, n, numbers]``, each item by itself, padded."""
        if isinstance(self.made, nn.Module):
            items = [self._called(item, "an item") for item in items]
        return padded(items)

    def _called(self, given: Any, at: str) -> Tensor:
        try:
            found = torch.as_tensor(self.made(given)).detach().float()
        except Exception as error:
            # A person's own code may raise whatever it likes.
            raise UserError(
                f"{at}: encoder.target={self.target} failed ({type(error).__name__}: {error})."
            ) from None
        found = found[None] if found.ndim == 1 else found
        if found.ndim != 2 or not len(found) or found.shape[1] != self.width:
            raise UserError(
                f"{at}: encoder.target={self.target} must give numbers [n, {self.width}], found "
                f"{tuple(found.shape)}; encoder.numbers says how many each vector has."
            )
        return found
