"""Whether bricks that want a site to themselves have it: a check of the plan, before any forward.

A brick that runs through PEFT computes a module's whole output anew, so nothing else may act on
that module for the same rows. Another brick on other rows of the batch is no company.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cfm_train.backbone.virtual import Weight
from cfm_train.errors import UserError


def refuse_company(module: str, acting: Sequence[tuple[Any, Weight]]) -> None:
    """Refuses a plan in which a plug with ``alone`` shares rows of its module with another plug.

    Args:
        module: dotted path of the module, for the sentence.
        acting: all plugs on the module with the weights of their bricks.

    Raises:
        UserError: naming the site.
    """
    for at, (plug, weight) in enumerate(acting):
        if not getattr(plug, "alone", False):
            continue
        for other, (_, other_weight) in enumerate(acting):
            if other != at and _meet(weight, other_weight):
                raise UserError(
                    f"The brick at site '{plug.site}' runs through PEFT, which needs the module "
                    f"'{module}' to itself: plug the others on other sites, or on other rows."
                )


def _meet(one: Weight, other: Weight) -> bool:
    """Whether some row (and token) has both bricks."""
    first, second = (_there(weight) for weight in (one, other))
    if first.ndim and second.ndim and first.ndim != second.ndim:  # rows against tokens
        first, second = (v[:, None] if v.ndim == 1 else v for v in (first, second))
    try:
        return bool((first & second).any())
    except RuntimeError:  # weights for batches of different sizes: the forward pass refuses them
        return True


def _there(weight: Weight) -> Tensor:
    value = (
        weight if isinstance(weight, Tensor) else torch.tensor(1.0 if weight is None else weight)
    )
    return value.detach().to("cpu") != 0
