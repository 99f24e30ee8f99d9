"""Several runs one after another, each an ordinary run with a record of its own.

A step is a list of overrides, as on the command line. All steps are composed and validated before
the first one starts; what a step needs of an earlier one (its brick) is checked when its turn
comes. Library, outputs and tracking are the sequence's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.config.compose import compose
from cfm_train.config.validate import validate
from cfm_train.errors import UserError


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        configs: the validated config of each step.
        fingerprints: content hashes of what the training steps read.
    """

    configs: list[dict[str, Any]]
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Composes and validates every step, and checks those that train against the world.

    Raises:
        UserError: a step is wrong; its number is named.
    """
    from cfm_train.launch.job import operation_of

    configs = []
    fingerprints: dict[str, str] = {}
    for number, step in enumerate(config["steps"], start=1):
        try:
            composed = validate({**compose(step), **inherited(config)})
            if composed["operation"] == "train":
                found = operation_of(composed).check(composed).fingerprints
                fingerprints |= {f"step {number}/{key}": value for key, value in found.items()}
        except UserError as error:
            raise UserError(f"Step {number} ({' '.join(step)}): {error}") from None
        configs.append(composed)
    if not configs:
        raise UserError("steps is empty: list the overrides of at least one run.")
    return Inputs(configs, fingerprints)


def inherited(config: dict[str, Any]) -> dict[str, Any]:
    """The keys that every step takes from the sequence."""
    return {key: config[key] for key in ("library", "outputs", "tracking")}


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Runs the steps; returns the record's own part, with the last step's matrix."""
    from cfm_train.launch.job import checked

    records = []
    for number, step in enumerate(inputs.configs, start=1):
        print(f"[{number}/{len(inputs.configs)}] {step['recipe']} {step['name']}", flush=True)
        job = checked(step)
        records.append((job.start(), job.record_path))
    last = records[-1][0]
    parts = [record for record, _ in records]
    return {
        "backbone": last["backbone"],
        "metrics": last["metrics"],
        "checks": {
            f"{record['name']}: {name}": value
            for record in parts
            for name, value in record["checks"].items()
        },
        "cost": {
            # Those of the steps, so that steps which an earlier start had finished count as well.
            "seconds": sum(r["cost"]["seconds"] for r in parts),
            "train_seconds": sum(r["cost"]["train_seconds"] or 0 for r in parts),
            "peak_memory_bytes": max(r["cost"]["peak_memory_bytes"] or 0 for r in parts),
        },
        "matrix": last["matrix"],
        **{key: last[key] for key in ("refitted", "comparison") if key in last},
        "drawn_with": [str(path) for _, path in records],
    }
