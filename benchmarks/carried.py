"""What benchmarks of knowledge and the senses share: the carried language model, and one run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def brick_lm() -> Path:
    """Its folder; the weights are checked against their hash."""
    from cfm_train.backbone.spec import resolve
    from cfm_train.config.compose import option

    return resolve(option("backbone", "brick_lm")).folder


def run(options: argparse.Namespace, *overrides: str, trains: bool = True) -> dict[str, Any]:
    """One run of the project, in this process; its record.

    Args:
        options: ``work``, ``backbone`` (a folder) and ``seed``.
        overrides: of the command line.
        trains: whether its recipe has a trainer.
    """
    from cfm_train.launch.job import prepare

    common = ["tracking.mode=disabled", f"outputs={options.work}", "backbone.dtype=float32"]
    common += ["backbone=hf", f"backbone.path={options.backbone}", f"seed={options.seed}"]
    common += [f"library={options.work}/library", *(["trainer.samples=0"] if trains else [])]
    return prepare([*common, *overrides]).start()
