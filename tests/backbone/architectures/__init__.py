"""Tiny configs of many architectures, and where their sites are: written down by hand.

Paths were read off transformers' modelling code, row ranges off the lines that split a projection.
``{i}`` stands for the layer's number; (path, rows) for a part of a fused module.
"""

from __future__ import annotations

from architectures.decoders import DECODERS
from architectures.encoder_decoders import ENCODER_DECODERS
from architectures.encoders import ENCODERS
from architectures.truth import GROUPED, SMALL, Architecture

ARCHITECTURES: dict[str, Architecture] = {**ENCODERS, **DECODERS, **ENCODER_DECODERS}

__all__ = ["ARCHITECTURES", "GROUPED", "SMALL", "Architecture"]
