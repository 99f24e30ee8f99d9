"""cfm_train: train, combine, compare and evolve bricks for frozen foundation models."""

from __future__ import annotations

from cfm_train.api import load
from cfm_train.errors import UserError

__all__ = ["UserError", "load"]
