"""The bridge: one affine map from the residual stream of a model to that of another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfm_train.backbone.load import Backbone
from cfm_train.backbone.slots import Plug
from cfm_train.bricks.brick import NATIVE_FILE, Brick
from cfm_train.stitching.layers.ridge import Fit, Moments
from cfm_train.stitching.layers.stitched import StitchedBackbone


class Bridge(Brick):
    """A stitching layer (Bansal et al. 2021, arXiv 2106.07682): ``y = W x + b`` for every token.

    Args:
        at: how many layers of the bottom run, and how many of the top are left out.

    Attributes:
        weight: ``[top width, bottom width]`` float32.
        bias: ``[top width]`` float32.
    """

    granularity: ClassVar[str] = "model"
    starts_as_identity: ClassVar[bool] = False

    def __init__(self, at: list[int]) -> None:
        super().__init__(at=list(at))

    def build(self, backbone: Backbone) -> Self:
        """Makes weight and bias, all zero, for a stitched backbone."""
        assert isinstance(backbone, StitchedBackbone)
        width, height = backbone.widths
        self.weight = nn.Parameter(torch.zeros(height, width, device=backbone.device))
        self.bias = nn.Parameter(torch.zeros(height, device=backbone.device))
        (bottom, low), (top, high) = backbone.parts
        i, j = backbone.at
        self.site_names = (f"layer.{i}",)  # goes into the first layer of the top
        self.ends = {
            "bottom": {"backbone": bottom, "fingerprint": low, "layers": [0, i]},
            "top": {"backbone": top, "fingerprint": high, "layers": [j, backbone.layers[1]]},
        }
        return self

    def plugs(self) -> Iterable[Plug]:
        """None: a stitched model takes the bridge as a whole."""
        return ()

    def forward(self, states: Tensor) -> Tensor:
        """``[…, bottom width]`` to ``[…, top width]``, float32."""
        return F.linear(states, self.weight, self.bias)

    def set(self, weight: Tensor, bias: Tensor) -> Self:
        """Takes over values, cast to float32."""
        with torch.no_grad():
            self.weight.copy_(weight)
            self.bias.copy_(bias)
        return self

    def fitted(self, fit: Fit) -> Self:
        """The closed form."""
        return self.set(fit.weight, fit.bias)

    def random(self, moments: Moments, seed: int) -> Self:
        """A drawn bridge of the right size: He et al. (2015), arXiv 1502.01852, then scaled.

        Normal weights with variance 2 / width, then one factor that gives what comes out the mean
        square of the states that it stands for; no bias.

        Args:
            moments: of the two streams.
            seed: seed of the draw.
        """
        assert moments.origin is not None
        generator = torch.Generator().manual_seed(seed)
        height, width = self.weight.shape
        drawn = torch.randn(height, width, generator=generator, dtype=torch.float64)
        drawn = (drawn * math.sqrt(2 / width)).to(self.weight.device)
        n, (x0, y0) = moments.count, moments.origin
        # Second moments about zero, from those about the origin.
        xx = moments.xx / n + torch.outer(moments.x / n, x0) + torch.outer(x0, moments.x / n)
        xx = xx + torch.outer(x0, x0)
        wanted = (moments.yy / n + 2 * y0 * moments.y / n + y0.square()).sum()
        found = (drawn @ xx * drawn).sum()
        return self.set(drawn * torch.sqrt(wanted / found), torch.zeros(height))

    def interface(self) -> dict[str, Any]:
        """The two ends: which layers of which models."""
        return {"kind": self.kind, "hyper": self.hyper, **self.ends}

    @classmethod
    def restore(
        cls, interface: Mapping[str, Any], files: Mapping[str, bytes], backbone: Backbone
    ) -> Self:
        """A bridge from what `interface` and `body_files` gave."""
        from safetensors.torch import load

        bridge = cls(**interface["hyper"]).build(backbone)
        bridge.load_tensors(load(files[NATIVE_FILE]))
        return bridge
