"""The contract of a connector: features of an encoder in, tokens of a language model out.

    features [items, n, d_v] and mask ─► tokens [items, m, d] and mask

A connector is one file in this folder with one subclass of `Connector`; its defaults stand in
``conf/connector/``. How many tokens an item becomes is known before any is computed (`count`), so
that placeholders are written into the text once, when it is tokenised.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from cfm_train.config.signature import class_of


class Connector(nn.Module, ABC):
    """Base class of all connectors.

    Subclasses have an annotated ``__init__`` without defaults: the values stand in their YAML.
    """

    @abstractmethod
    def build(self, width: int, hidden: int, scale: float) -> Self:
        """Makes the parameters.

        Args:
            width: d_v, numbers of a feature vector; features come standardised.
            hidden: d, width of the language model.
            scale: deviation of the language model's embeddings, which new tokens should have too.
        """

    @abstractmethod
    def count(self, n: int) -> int:
        """How many tokens an item of n feature vectors becomes."""

    @abstractmethod
    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of some items.

        Args:
            features: float32 ``[items, n, d_v]``.
            mask: bool ``[items, n]``, which of them are there.

        Returns:
            Tokens ``[items, m, d]``, and which of them are there, bool ``[items, m]``.
        """


def make_connector(section: Mapping[str, Any]) -> Connector:
    """A new connector from its ``kind`` and the arguments of the kind's class."""
    arguments = {k: v for k, v in section.items() if k not in ("kind", "learning_rate")}
    made: Connector = class_of("modality/connectors", section["kind"], Connector)(**arguments)
    return made


def projection(width: int, out: int, scale: float, bias: bool = True) -> nn.Linear:
    """A linear map that gives numbers of deviation ``scale`` for standardised features."""
    linear = nn.Linear(width, out, bias=bias)
    nn.init.normal_(linear.weight, std=scale / width**0.5)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def in_turn(tokens: Tensor, mask: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """``[items, n, times · d]`` as ``[items, n · times, d]``, and the mask with it."""
    items, n, wide = tokens.shape
    return tokens.reshape(items, n * times, wide // times), torch.repeat_interleave(mask, times, 1)
