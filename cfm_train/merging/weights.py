"""The weights of a merge: one number for each input, a curve over depth, or by site.

A weight is a number, or a list of numbers that is interpolated over the depth of the layers (the
first number for the first layer, the last for the last; what lies before and after the layers takes
the ends). A filter ``[pattern, w₁, …, w_N]`` gives the sites that its pattern matches weights of
their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cfm_train.backbone.sites import fits
from cfm_train.errors import UserError

Weight = float | Sequence[float]
#: The number of a layer in a site's name, ``layer.3.attn.q``, or in a tensor's,
#: ``model.layers.3…``.
_LAYER = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Weights:
    """The weights of ``N`` inputs wherever they are asked for.

    Attributes:
        given: one weight for each input.
        filters: pattern -> one weight for each input.
        layers: how many layers each stack has, by its prefix in names; ``{"": 6}`` for one stack.
        normalize: whether the weights of a site are divided by their sum.
    """

    given: tuple[Weight, ...]
    filters: dict[str, tuple[Weight, ...]]
    layers: Mapping[str, int]
    normalize: bool

    def at(self, site: str) -> list[float]:
        """The ``N`` weights of a site (or of a tensor named after one).

        Raises:
            UserError: two filters match the site, or its weights add up to zero and are to be
                normalised.
        """
        matching = [p for p in self.filters if fits(p, site)]
        if len(matching) > 1:
            raise UserError(
                f"merge.filters: both '{matching[0]}' and '{matching[1]}' match '{site}': make the "
                "patterns exclude each other."
            )
        chosen = self.filters[matching[0]] if matching else self.given
        depth = depth_of(site, self.layers)
        weights = [interpolate(weight, depth) for weight in chosen]
        if not self.normalize:
            return weights
        total = math.fsum(weights)
        if abs(total) < 1e-8:
            raise UserError(
                f"merge.normalize: the weights at '{site}' add up to zero: set merge.normalize="
                "false, or give others."
            )
        return [weight / total for weight in weights]


def depth_of(site: str, layers: Mapping[str, int]) -> float:
    """Where a site lies: 0 at the first layer, 1 at the last; embeddings at 0, the rest at 1."""
    found = _LAYER.search(site)
    if found is None:
        return 0.0 if "emb" in site or "wte" in site else 1.0
    stacks = [prefix for prefix in layers if site.startswith(prefix)]
    count = layers[max(stacks, key=len)] if stacks else max(layers.values())
    return int(found[1]) / max(1, count - 1)


def interpolate(weight: Weight, depth: float) -> float:
    """A weight at a depth from 0 to 1, linear between the numbers of a list."""
    if not isinstance(weight, Sequence):
        return float(weight)
    place = min(max(depth, 0.0), 1.0) * (len(weight) - 1)
    low = min(int(place), len(weight) - 1)
    high = min(low + 1, len(weight) - 1)
    return float(weight[low] + (place - low) * (weight[high] - weight[low]))


def check_weights(weights: object, count: int, key: str = "weights") -> tuple[Weight, ...]:
    """Weights as a person gave them: ``count`` finite numbers, or lists of such.

    Raises:
        UserError: they are something else.
    """
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        raise UserError(f"{key}={weights} is no list: give one number for each brick, [0.3,0.7].")
    if len(weights) != count:
        raise UserError(f"{key} has {len(weights)} numbers for {count} bricks: give one each.")
    return tuple(_checked(weight, key) for weight in weights)


def _checked(weight: object, key: str) -> Weight:
    if isinstance(weight, Sequence) and not isinstance(weight, str) and weight:
        return tuple(_number(one, key) for one in weight)
    return _number(weight, key)


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(
            f"{key}: {value!r} is no finite number: give one number for each brick, [0.3,0.7], or "
            "a list of numbers over the depth of the layers, [[0,1],[1,0]]."
        )
    return float(value)


def check_filters(filters: object, count: int) -> dict[str, tuple[Weight, ...]]:
    """Filters as a person gave them, ``[[pattern, w₁, …, w_N], …]``.

    Raises:
        UserError: one of them is something else, or a pattern stands twice.
    """
    found: dict[str, tuple[Weight, ...]] = {}
    for one in filters if isinstance(filters, Sequence) else ():
        right = isinstance(one, Sequence) and not isinstance(one, str) and len(one) > 1
        if not right or not isinstance(one[0], str):
            raise UserError(
                f"merge.filters: {one!r} is no filter: write [pattern, one weight for each brick], "
                "as in [[attn.*,0.3,0.7]]."
            )
        if one[0] in found:
            raise UserError(f"merge.filters has '{one[0]}' twice.")
        found[one[0]] = check_weights(one[1:], count, f"merge.filters '{one[0]}'")
    return found


def check_matched(patterns: Iterable[str], sites: Collection[str]) -> None:
    """Refuses a filter that nothing has a use for.

    Args:
        patterns: of the filters.
        sites: what the inputs change.

    Raises:
        UserError: a pattern matches none of them.
    """
    for pattern in patterns:
        if not any(fits(pattern, site) for site in sites):
            raise UserError(
                f"merge.filters: '{pattern}' matches nothing that the bricks change, such as "
                f"'{min(sites)}'."
            )
