"""The rows of ``merge_tasks.py``: every rule with the parameters that are tuned."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

BASELINE = "task_arithmetic"

SCALES = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0]
FEW = [0.1, 0.3]
TIES = {"density": [0.2], "scale": [0.3, 1.0, 2.0]}

#: The row that is searched by gradient instead of over a grid, and its steps.
GRADIENT = "weights by gradient"
SEARCH = {
    "kind": "gradient", "objective": "loss", "rows": None, "by": "layer", "balance": True,
    "steps": 200, "every": 25, "batch": 4, "learning_rate": 0.05,
}  # fmt: skip

#: After the name of a row: its merge with heads trained anew.
REFITTED = ", heads refitted"

#: Rule option -> values of each parameter that is tuned. The baseline has the finest grid.
GRIDS: dict[str, dict[str, list[Any]]] = {
    "linear": {},
    "task_arithmetic": {"scale": SCALES},
    "regmean": {"alpha": [0.5, 0.9, 1.0]},
    "tsv": {"scale": [0.3, 0.6, 1.0]},
    "iso_c": {"scale": [0.3, 0.6, 1.0]},
    "wudi": {"scale": [0.3, 0.6, 1.0]},
    "ties/paper": TIES,
    "iso_cts": {"scale": [0.3, 0.6, 1.0]},
    "fisher": {"scale": [0.5, 1.0, 2.0]},
    "ties/knots": TIES,
    "karcher": {"scale": [1.0, 3.0]},
    "ties/mergekit": TIES,
    "ties/peft": TIES,
    "ties/paper in core space": TIES,
    "task_arithmetic + magnitude": {"density": [0.5], "scale": FEW},
    "task_arithmetic + dare": {"density": [0.5], "scale": FEW},
    "task_arithmetic + della": {"density": [0.5], "scale": FEW},
    "task_arithmetic + breadcrumbs": {"density": [0.85], "scale": FEW},
    "task_arithmetic + tall": {"threshold": [0.2, 0.4], "agree": [2], "scale": [0.5]},
    "magmax": {"scale": [0.3, 0.6]},
    "sce": {"scale": [0.5, 1.0, 2.0]},
    "model_stock": {},
    "multislerp": {"scale": [1.0, 3.0]},
}

#: Every row of the table, the baseline first: the gradient starts from its scale.
RULES = [
    BASELINE,
    GRADIENT,
    *(rule + REFITTED for rule in (BASELINE, GRADIENT)),
    *(rule for rule in GRIDS if rule != BASELINE),
]


def option_of(rule: str) -> tuple[str, dict[str, Any]]:
    """A line of the table as an option of ``conf/rule`` and what it changes."""
    if rule.endswith(" in core space"):
        return rule.removesuffix(" in core space"), {"space": "core"}
    name, _, sparsify = rule.partition(" + ")
    return name, {"sparsify": sparsify} if sparsify else {}


def candidates(rule: str) -> Iterator[dict[str, Any]]:
    """Every point of a rule's grid."""
    grid = GRIDS[rule]
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))
