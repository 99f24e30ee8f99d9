"""Generators as functions of seed and position: a resumed run draws what the unbroken one drew."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive(seed: int, *parts: int | str) -> int:
    """A 63-bit seed for one purpose: the same parts give the same number on every machine."""
    text = ":".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def reseed(seed: int, *parts: int | str) -> None:
    """Seeds Python, NumPy and torch for one purpose."""
    value = derive(seed, *parts)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
