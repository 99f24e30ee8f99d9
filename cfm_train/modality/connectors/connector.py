"""The contract of a connector: features of an encoder in, tokens of a language model out.

    features [items, n, d_v] and mask ─► tokens [items, m, d] and mask
                                      ─► plugs behind layers, for one that is looked at from there

A connector is one file in this folder with one subclass of `Connector`; its defaults stand in
``conf/connector/``. How many tokens an item becomes is known before any is computed (`count`), so
that placeholders are written into the text once, when it is tokenised.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from cfm_train.backbone.plugs import Plug
from cfm_train.config.signature import class_of

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


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

    def attach(self, backbone: Backbone) -> tuple[str, ...]:
        """Makes what acts elsewhere than in place of placeholders, after `build`.

        Args:
            backbone: what it is made for; nothing plugged.

        Returns:
            The names of the sites where it acts; none as a rule.

        Raises:
            UserError: it does not fit the backbone.
        """
        return ()

    def plugs(self) -> Iterable[Plug]:
        """What it puts into the slots of the sites that `attach` named."""
        return ()

    def look(self, here: Tensor | None, past: int, items: list[int], tags: int) -> None:
        """Called as a pass of the backbone begins, behind `forward`; see `plugs.Tokens`.

        Args:
            here: bool ``[rows, seq]``, where the ids are placeholders; None for a pass without ids.
            past: tokens in the cache that the pass goes on from.
            items: how many items each row of the batch has; empty where there are none.
            tags: placeholders around each item's own.
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
