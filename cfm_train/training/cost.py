"""What training costs: memory, and the share of the floating-point limit of a frozen backbone.

With N frozen parameters in matrix products, a token costs 2N forward and 2N for the gradient of the
activations; the 2N for weight gradients vanish. So 4N FLOP a token is the work, and the share
shown is

    tokens/s × 4N ÷ (best matrix product rate of this machine in this dtype)

(attention's own term and the brick are left out: small at usual lengths).
"""

from __future__ import annotations

import resource
import sys
import time

import torch

from cfm_train.backbone.load import Backbone


def matmul_parameters(backbone: Backbone) -> int:
    """N: parameters of the backbone's linear maps, without embeddings and without the LM head."""
    modules = {
        site.module
        for site in backbone.sites.values()
        if site.kind in ("linear", "conv1d", "experts")
    }
    return sum(
        p.numel()
        for path in modules
        for p in backbone.model.get_submodule(path).parameters()
        if p.ndim >= 2
    )


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
