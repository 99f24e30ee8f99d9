"""A weighted sum of low-rank bricks without merging them: plugged together, each with its weights.

    Σ wᵢ(site) sᵢ Bᵢ Aᵢ

The bank multiplies each brick's part by its weight, so a point of a search costs no merge, and
gradients reach the weights. Where weights differ from site to site, a brick is plugged in parts:
those of its sites that have the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cfm_train.backbone.plugs import Plug
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.lora import LoRA
from cfm_train.merging.mix import Mix
from cfm_train.merging.spaces.low_rank import is_dora
from cfm_train.merging.weights import Weights, depth_of, interpolate


@dataclass(frozen=True)
class Part:
    """What a brick plugs in at some of its sites."""

    brick: Brick
    sites: frozenset[str]

    def plugs(self) -> Iterable[Plug]:
        """The brick's own plugs at these sites."""
        return [plug for plug in self.brick.plugs() if plug.site in self.sites]


def adds_up(bricks: Sequence[Brick], mix: Mix) -> bool:
    """Whether the bricks plugged together are the merge, up to rounding."""
    exact = all(isinstance(brick, LoRA) and not is_dora(brick) for brick in bricks)
    return exact and mix.adds_up and mix.rank is None and mix.space in ("auto", "delta", "cat")


def parts_by(
    bricks: Sequence[Brick], group: Callable[[str], Hashable]
) -> list[tuple[int, str, Part]]:
    """The bricks in parts whose sites are of one group.

    Args:
        bricks: the bricks.
        group: of a site.

    Returns:
        The brick's number, one of the sites, and the part; bricks in order.
    """
    parts = []
    for number, brick in enumerate(bricks):
        groups: dict[Hashable, list[str]] = {}
        for site in brick.site_names:
            groups.setdefault(group(site), []).append(site)
        parts += [(number, s[0], Part(brick, frozenset(s))) for s in groups.values()]
    return parts


def plan(
    bricks: Sequence[Brick], given: Weights, scale: float
) -> tuple[list[Part], list[float | Tensor | None]]:
    """Parts and their weights ``λ wᵢ``, for `Slots.plug`.

    Args:
        bricks: low-rank bricks.
        given: their weights wherever they are asked for.
        scale: λ.
    """
    parts = parts_by(bricks, lambda site: tuple(given.at(site)))
    weights: list[float | Tensor | None] = [
        scale * given.at(site)[number] for number, site, _ in parts
    ]
    return [part for _, _, part in parts], weights


class Followed:
    """The same with weights that gradients reach, at some knots over the depth of the layers.

    Args:
        bricks: low-rank bricks.
        mix: λ, and whether weights are divided by their sum.
        layers: how many layers each stack has.
        knots: numbers for each brick, see `weights.interpolate`; 1 for one weight everywhere.
    """

    def __init__(
        self, bricks: Sequence[Brick], mix: Mix, layers: dict[str, int], knots: int
    ) -> None:
        self.mix, self.layers, self.knots = mix, layers, knots
        depth = (lambda site: depth_of(site, layers)) if knots > 1 else (lambda site: 0.0)
        found = parts_by(bricks, depth)
        self.parts = [part for _, _, part in found]
        self._places = [(number, self._share(depth(site))) for number, site, _ in found]

    def _share(self, depth: float) -> Tensor:
        """How much each knot counts at a depth, ``[K]`` float64."""
        if self.knots == 1:
            return torch.ones(1, dtype=torch.float64)
        units = torch.eye(self.knots, dtype=torch.float64).tolist()
        return torch.tensor([interpolate(unit, depth) for unit in units], dtype=torch.float64)

    def weights(self, knots: Tensor) -> list[float | Tensor | None]:
        """The weight of each part, ``[1]`` float64 with a gradient.

        Args:
            knots: ``[N, K]`` float64.
        """
        found: list[float | Tensor | None] = []
        for number, share in self._places:
            each = knots @ share  # [N]
            weight = each[number] / each.sum() if self.mix.normalize else each[number]
            found.append((self.mix.scale * weight).view(1))
        return found
