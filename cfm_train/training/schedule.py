"""Learning-rate schedules: a factor for each optimiser step, after a linear warm-up."""

from __future__ import annotations

import math

from cfm_train.errors import UserError, nearest

SCHEDULES = ("linear", "cosine", "constant")


def factor(step: int, *, total: int, warmup: float, schedule: str) -> float:
    """The factor on the learning rate at a step.

    Args:
        step: optimiser steps done so far.
        total: optimiser steps of the whole run.
        warmup: share of them over which the rate rises from 0, in [0, 1).
        schedule: ``linear`` or ``cosine`` fall to 0 at ``total``; ``constant`` stays.

    Raises:
        UserError: there is no such schedule.
    """
    if schedule not in SCHEDULES:
        raise UserError(
            f"trainer.schedule '{schedule}' does not exist.{nearest(schedule, SCHEDULES)}"
        )
    rising = math.ceil(total * warmup - 1e-9)  # 100 steps of which 0.07 are 7, not 8
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    done = (step - rising) / max(1, total - rising)
    return 1.0 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
