"""What training costs: memory, and the share of the floating-point limit of a frozen backbone.

With N frozen parameters in matrix products, a token costs 2N FLOP forward. Backward, no weight has
a gradient, and activations have one only above the lowest brick: another 2N for the layers from
there on, nothing where a head alone is trained. Where a model is pretrained, its weights have
gradients too: 2N more. What is read without gradients (by a teacher) costs 2N. In an encoder-
decoder each stack reads its own tokens, and cross-attention's keys and values those of the encoder.
The share shown is

    FLOP/s of this work ÷ (best matrix product rate of this machine in this dtype)

Attention's own term, the language model's head and the brick are left out; the layer of the lowest
brick counts whole.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from cfm_train.backbone.load import Backbone
from cfm_train.backbone.sites import Site

#: Cross-attention's keys and values: part of the decoder, but computed from the encoder's tokens.
_CROSSING = re.compile(r"\.cross\.(k|v|kv)$")


@dataclass(frozen=True)
class Work:
    """FLOP of forward and backward through the frozen backbone.

    Attributes:
        source: for each token that the only stack, or the encoder, reads.
        crossing: for each of these where a decoder runs as well.
        target: for each token of that decoder.
    """

    source: float
    crossing: float
    target: float

    def of(self, tokens: int, targets: int) -> float:
        """FLOP of a batch.

        Args:
            tokens: real tokens of the input.
            targets: real tokens of the decoder beside it, 0 where none runs.
        """
        return tokens * (self.source + (self.crossing if targets else 0)) + targets * self.target


def work_of(backbone: Backbone, sites: Iterable[str], *, weights: bool = False) -> Work:
    """What a brick at some sites makes a training step cost.

    Args:
        backbone: the backbone.
        sites: names of the brick's sites; none for a head alone.
        weights: whether the backbone's own weights at these sites have gradients.
    """
    lowest: dict[str, int] = {}
    for name in sites:
        site = backbone.sites[name]
        lowest[site.stack] = min(_height(site, backbone), lowest.get(site.stack, sys.maxsize))
    encoder = "encoder." in lowest
    if encoder:  # the decoder's every layer looks at the encoder
        lowest["decoder."] = 0
    flops = {"source": 0.0, "crossing": 0.0, "target": 0.0}
    for site in _products(backbone):
        if _CROSSING.search(site.name):
            part, learns = "crossing", encoder
        else:
            part = "target" if site.stack == "decoder." else "source"
            learns = _height(site, backbone) >= lowest.get(site.stack, sys.maxsize)
        flops[part] += ((6 if weights else 4) if learns else 2) * _active(backbone, site)
    return Work(**flops)


def _products(backbone: Backbone) -> Iterable[Site]:
    """One site of each module that multiplies by a weight; no embedding, no LM head."""
    kinds = ("linear", "conv1d", "experts")
    return {site.module: site for site in backbone.sites.values() if site.kind in kinds}.values()


def _height(site: Site, backbone: Backbone) -> int:
    """The number of the site's layer: 0 for what lies before the layers, after them the next."""
    if site.layer is not None:
        return site.layer
    before = site.name.removeprefix(site.stack).startswith("embed")
    return 0 if before else backbone.sites.layers[site.stack]


def _active(backbone: Backbone, site: Site) -> float:
    """Parameters that a token is multiplied by: of the chosen experts alone, and in every pass."""
    config = backbone.model.config
    matrices = [p for p in backbone.model.get_submodule(site.module).parameters() if p.ndim >= 2]
    if site.kind == "experts":
        chosen = getattr(config, "num_experts_per_tok", 1)
        return sum(p.numel() / p.shape[0] * chosen for p in matrices if p.ndim == 3)
    layers = backbone.sites.layers[site.stack]
    # ALBERT runs one set of weights as often as it says it has layers.
    passes = getattr(config, "num_hidden_layers", layers) / layers if not site.stack else 1
    return passes * sum(p.numel() for p in matrices)


def peak_flops(dtype: torch.dtype, device: torch.device, *, size: int = 1024) -> float:
    """The best rate of a square matrix product in FLOP/s, from a quarter of a second."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    until = time.perf_counter() + 0.25
    while time.perf_counter() < until:
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def peak_memory() -> int:
    """The most memory this process has held so far, in bytes: on the GPU where there is one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024
