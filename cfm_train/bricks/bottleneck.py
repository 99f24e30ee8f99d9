"""Bottleneck adapters: a small two-layer network on a sublayer's output, or beside it on its input.

    houlsby     y ← y + s · U f(D y)     after attention's output and after the feed-forward
                                         (Houlsby et al. 2019, arXiv 1902.00751)
    pfeiffer    y ← y + s · U f(D y)     after the feed-forward alone
                                         (Pfeiffer et al. 2020, arXiv 2005.00247)
    parallel    y ← y + s · U f(D x)     from the feed-forward's input x to its output
                                         (He et al. 2022, arXiv 2110.04366)

y is a sublayer's output before it joins the residual stream, D and U are linear maps with biases. U
starts as zero: a new brick changes nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfm_train.backbone.plugs import Call, Out
from cfm_train.bricks.brick import Brick, linear_sites, parameter_name
from cfm_train.config.types import Positive, Rate

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone

#: The sites whose output an adapter joins; ``o`` is that of self- and of cross-attention.
PLACES = {"houlsby": ["o", "ffn.down"], "pfeiffer": ["ffn.down"], "parallel": ["ffn.down"]}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Bottleneck(Brick):
    """Adapters in every chosen layer.

    Args:
        placement: ``houlsby``, ``pfeiffer`` or ``parallel``, see above.
        bottleneck: width of the adapter's inside.
        activation: what stands between the two maps.
        scale: s, by which the adapter's output is multiplied.
        layers: numbers of the layers to use, negative ones from the top; None for all.
    """

    def __init__(
        self,
        placement: Literal["houlsby", "pfeiffer", "parallel"],
        bottleneck: Positive,
        activation: Literal["relu", "gelu", "silu", "tanh"],
        scale: Rate,
        layers: list[int] | None,
    ) -> None:
        super().__init__(
            placement=placement,
            bottleneck=bottleneck,
            activation=activation,
            scale=scale,
            layers=layers,
        )
        self.down = nn.ParameterDict()
        self.down_bias = nn.ParameterDict()
        self.up = nn.ParameterDict()
        self.up_bias = nn.ParameterDict()

    def build(self, backbone: Backbone) -> Self:
        """Makes the two maps for every place."""
        width = self.hyper["bottleneck"]
        sites = linear_sites(backbone, PLACES[self.hyper["placement"]], self.hyper["layers"])
        for site in sites:
            source = self._source(site.name)
            inside = site.out_features if source is None else backbone.sites[source].in_features
            key = parameter_name(site.name)
            self.down[key] = nn.Parameter(torch.empty(width, inside))
            nn.init.kaiming_uniform_(self.down[key], a=math.sqrt(5))
            self.down_bias[key] = nn.Parameter(torch.zeros(width))
            self.up[key] = nn.Parameter(torch.zeros(site.out_features, width))
            self.up_bias[key] = nn.Parameter(torch.zeros(site.out_features))
        self.site_names = tuple(site.name for site in sites)
        return self.to(backbone.device)

    def _source(self, name: str) -> str | None:
        """The site whose input an adapter reads; None for the output that it joins."""
        if self.hyper["placement"] != "parallel":
            return None
        return name.removesuffix("down") + "up"

    def plugs(self) -> Iterable[Out]:
        """One plug at the output of each place."""
        for name in self.site_names:
            source = self._source(name)
            yield Out(name, functools.partial(self._adapt, parameter_name(name), source), source)

    def _adapt(self, key: str, source: str | None, call: Call) -> Tensor:
        assert call.y is not None
        x = call.y if source is None else call.captured[source]
        dtype = call.y.dtype
        h = F.linear(x.to(dtype), self.down[key].to(dtype), self.down_bias[key].to(dtype))
        h = ACTIVATIONS[self.hyper["activation"]](h)
        up = F.linear(h, self.up[key].to(dtype), self.up_bias[key].to(dtype))
        return torch.add(call.y, up, alpha=self.hyper["scale"])
