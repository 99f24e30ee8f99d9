"""SLERP: two updates are interpolated along the arc between them (Shoemake 1985).

    τ = sin((1-t)Ω)/sinΩ τ₁ + sin(tΩ)/sinΩ τ₂        Ω: the angle between them, t = w₂/(w₁+w₂)

Directions move along the sphere, and lengths with the same coefficients. Two that are nearly
parallel or opposite have no such arc worth the rounding: from ``dot_threshold`` on they are
interpolated on the line between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfm_train.config.types import Fraction
from cfm_train.merging import sphere
from cfm_train.merging.rule import Facts, Rule, shares

#: Of a squared sine in float64.
_ROUNDING = 1e-14


class Slerp(Rule):
    """Spherical interpolation of two updates, each taken as one vector.

    Args:
        dot_threshold: from this absolute cosine on the interpolation is linear.
    """

    fewest = 2
    most = 2
    needs_base = False
    promises = frozenset({"permutation", "idempotent", "off"})

    def __init__(self, dot_threshold: Fraction) -> None:
        self.dot_threshold = dot_threshold

    def combine(self, updates: Tensor, weights: Tensor, facts: Facts) -> Tensor:
        """See the class; t is the second input's share of the weights."""
        t = shares(weights, self.kind)[1]
        _, cosines = sphere.directions(updates)
        return sphere.add_up(updates, arc(cosines[0, 1], t, self.dot_threshold))


def arc(cosine: Tensor, t: Tensor, threshold: float) -> Tensor:
    """The coefficients of two vectors at ``t`` of the arc between them.

    Args:
        cosine: ``[*shape]`` float64, of the angle between them.
        t: a number, 0 for the first.
        threshold: from this absolute cosine on they are ``1 - t`` and ``t``; 1 for where float64
            cannot tell the angle from a straight one.

    Returns:
        ``[2, *shape]`` float64.
    """
    t = t.double().cpu()
    angle = cosine.acos()
    # Of opposite vectors the sine is not zero but rounding, and no plane is theirs.
    straight = (cosine.abs() > threshold) | (1 - cosine.square() <= _ROUNDING)
    sine = torch.where(straight, 1.0, angle.sin())
    first = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / sine)
    second = torch.where(straight, t, (t * angle).sin() / sine)
    return torch.stack([first, second])
