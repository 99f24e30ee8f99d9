"""Which dtype a processor multiplies natively: read off the hardware, never assumed."""

from __future__ import annotations

from pathlib import Path

import torch


def native_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32.

    Args:
        device: where the backbone will run.

    Returns:
        ``torch.bfloat16`` or ``torch.float32``; emulated bfloat16 is slower than float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        # From Ampere (8.0) on; `torch.cuda.is_bf16_supported` also counts emulation.
        native = torch.cuda.get_device_capability(device)[0] >= 8 and torch.version.hip is None
        native = native or (torch.version.hip is not None and torch.cuda.is_bf16_supported(False))
    else:
        native = device.type == "cpu" and bool(cpu_bfloat16_flags())
    return torch.bfloat16 if native else torch.float32


def cpu_bfloat16_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The flags of this processor that stand for bfloat16 products; empty where there are none.

    x86 names them ``avx512_bf16`` and ``amx_bf16``, 64-bit Arm ``bf16``; a system without
    ``/proc/cpuinfo`` counts as having none, because a wrong guess costs an order of magnitude.
    """
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return set()
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return set(flags.partition(":")[2].split()) & {"avx512_bf16", "amx_bf16", "bf16"}
