"""The language model that the package carries, which benchmarks run on by default, as a folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def brick_lm() -> Path:
    """Its folder; the weights are checked against their hash."""
    from cfm_train.backbone.spec import resolve
    from cfm_train.config.compose import option

    return resolve(option("backbone", "brick_lm")).folder
