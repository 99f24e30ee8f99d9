"""Neurons beside those of the feed-forward: keys that look for something, values that say it.

    y ← y + Σ_j f(k_j · x + b_j) v_j         x: the feed-forward's input, y: its output

A feed-forward layer is a key-value memory (Geva et al. 2021, arXiv 2012.14913), and a fact that it
lacks is a few neurons more (T-Patcher, Huang et al. 2023, arXiv 2301.09785). With facts
(`bricks/facts.py`) every fact has its own neurons. Values start as zero: a new brick changes
nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from cfm_train.backbone.plugs import Call, Out
from cfm_train.bricks.bottleneck import ACTIVATIONS
from cfm_train.bricks.brick import Brick, linear_sites, parameter_name
from cfm_train.bricks.facts import ByFact, row_mask, stack
from cfm_train.config.types import Positive

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


class Neurons(ByFact, Brick):
    """A few more neurons in the feed-forward of chosen layers.

    Args:
        neurons: how many in each layer; for each fact where there are facts.
        activation: f.
        layers: numbers of the layers to use, negative ones from the top; None for all.
    """

    granularity: ClassVar[str] = "neuron"

    def __init__(
        self,
        neurons: Positive,
        activation: Literal["relu", "gelu", "silu", "tanh"],
        layers: list[int] | None,
    ) -> None:
        super().__init__(neurons=neurons, activation=activation, layers=layers)
        self.keys = nn.ParameterDict()
        self.biases = nn.ParameterDict()
        self.values = nn.ParameterDict()
        self.begin()

    def build(self, backbone: Backbone) -> Self:
        """Makes keys, biases and values for every layer; keys are drawn, one fact like another."""
        self.know(backbone)
        count, width = len(self), self.hyper["neurons"]
        sites = linear_sites(backbone, ["ffn.down"], self.hyper["layers"])
        for site in sites:
            inside = backbone.sites[_source(site.name)].in_features
            key = parameter_name(site.name)
            drawn = torch.empty(width, inside).uniform_(-1, 1) / math.sqrt(inside)
            self.keys[key] = nn.Parameter(drawn.expand(count, -1, -1).clone())
            self.biases[key] = stack(count, width)
            self.values[key] = stack(count, width, site.out_features)
        self.site_names = tuple(site.name for site in sites)
        return self.to(backbone.device)

    def plugs(self) -> Iterable[Out]:
        """One plug for each layer, and the one that decides which fact acts."""
        if self.facts:
            yield self.watch()
        for name in self.site_names:
            yield Out(name, functools.partial(self._add, parameter_name(name)), _source(name))

    def _add(self, key: str, call: Call) -> Tensor:
        assert call.y is not None
        x, y = call.captured[_source(call.site.name)], call.y
        keys, biases, values = self.keys[key], self.biases[key], self.values[key]
        if not self.facts or (self.gate is None and self.chosen is None):  # all on every row
            return y + self._neurons(
                x, keys.flatten(0, 1), biases.flatten(), values.flatten(0, 1), y
            )
        facts = self.places(y.shape[0])
        if bool((facts < 0).all()):
            return y
        index = facts.clamp_min(0).to(y.device)
        part = self._neurons(x, keys[index], biases[index][:, None], values[index], y)
        return torch.where(row_mask(facts, y), y + part, y)

    def _neurons(
        self, x: Tensor, keys: Tensor, biases: Tensor, values: Tensor, y: Tensor
    ) -> Tensor:
        """``Σ_j f(k_j · x + b_j) v_j``, by rows where keys are ``[batch, neurons, in]``."""
        x, keys, biases, values = (part.to(y.dtype) for part in (x, keys, biases, values))
        if keys.ndim == 2 or x.ndim == 3:
            fired = x @ keys.transpose(-1, -2) + biases
        else:
            fired = torch.einsum("bi,bni->bn", x, keys) + biases[:, 0]
            return torch.einsum("bn,bno->bo", ACTIVATIONS[self.hyper["activation"]](fired), values)
        return ACTIVATIONS[self.hyper["activation"]](fired) @ values


def _source(name: str) -> str:
    """The site whose input neurons read: that of the feed-forward."""
    return name.removesuffix("down") + "up"
