"""The contract of a sparsifier: which numbers of each update are kept before they are combined.

One file in this folder with one subclass of `Sparsifier`; defaults stand in ``conf/sparsify/``.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor


class Sparsifier(ABC):
    """Base class of all sparsifiers.

    Attributes:
        kind: its name, that of its file.
        random: whether it draws; the draws depend on seed, entry and input alone.
        elementwise: whether what becomes of a number depends on the same place of the inputs alone.
        rows: whether it ranks the numbers of a row ``[..., in]`` among themselves, so that a group
            of several tensors cannot be taken at once.
    """

    kind: ClassVar[str]
    random: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False
    rows: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = cls.__module__.rsplit(".", 1)[-1]

    @abstractmethod
    def sparsify(self, updates: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The updates with some numbers set to zero (and the rest rescaled).

        Args:
            updates: ``[N, *shape]``, float32 or float64.
            generators: one for each input, for sparsifiers that draw.

        Returns:
            ``[N, *shape]``, a new tensor where anything changes.
        """

    def keeps(self, count: int) -> int | None:
        """How many of ``count`` numbers stay, where keeping the largest is all that it does.

        Such a trim needs no more of an update than its threshold, so whole models are trimmed a
        piece at a time. None for every other sparsifier.
        """
        return None


def generator(seed: int, entry: str, source: str) -> torch.Generator:
    """The generator of one input's entry: a function of seed and names, so that neither the order
    of the inputs, nor threads, nor how a model lies in files has a say.

    Args:
        seed: the run's seed.
        entry: name of the tensor or group.
        source: the input: a brick with its version, a model's fingerprint.
    """
    digest = hashlib.sha256(f"{seed}\n{entry}\n{source}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def largest(magnitudes: Tensor, keep: int) -> Tensor:
    """The mask of the ``keep`` largest numbers of a vector; of equal ones the first by position.

    Args:
        magnitudes: ``[n]``, not negative.
        keep: 0 to n.

    Returns:
        bool ``[n]`` with exactly ``keep`` true.
    """
    count = magnitudes.numel()
    if keep >= count:
        return torch.ones_like(magnitudes, dtype=torch.bool)
    if keep <= 0:
        return torch.zeros_like(magnitudes, dtype=torch.bool)
    threshold = magnitudes.kthvalue(count - keep + 1).values
    mask = magnitudes > threshold
    equal = (magnitudes == threshold).nonzero().squeeze(1)
    mask[equal[: keep - int(mask.sum())]] = True
    return mask


def same_l1(kept: Tensor, whole: Tensor) -> Tensor:
    """``kept`` scaled to the L1 norm of ``whole``; as it is where either is zero."""
    before, after = whole.abs().sum(), kept.abs().sum()
    return kept if not before or not after else kept * (before / after)
