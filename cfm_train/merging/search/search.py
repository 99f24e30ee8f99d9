"""The contract of a way to find the weights of a merge.

One file in this folder with one subclass of `Search`. It proposes points, one number for each axis
of the problem, and is sent the cost of each, the smaller the better:

    proposals = search.propose(problem)
    point = next(proposals)
    while …: point = proposals.send(cost of point)

What is merged, which rows are answered and what cost means, is no business of a method; the point
of least cost is taken, the first one where several have it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from cfm_train.config import signature
from cfm_train.config.searching import BASE, ROOM, Axis

Point = Sequence[float]
Proposals = Generator[Point, float, None]
#: ``slope(weights, step)`` adds the gradient of a batch's loss to ``weights.grad`` (``[N, K]``
#: float64, a leaf) and returns the loss.
Slope = Callable[[Tensor, int], float]


@dataclass(frozen=True)
class Problem:
    """What is to be found.

    Attributes:
        axes: one for each number; of a search that follows gradients, those of the first brick come
            first, from its first layer to its last.
        start: the merge's own value on each axis.
        seed: of everything that is drawn.
        skips: whether a point makes no merge at all, such as weights that add up to zero where they
            are averaged.
        bricks: how many there are.
        slope: the gradient for a search that follows it; None for others.
    """

    axes: Sequence[Axis]
    start: Point
    seed: int
    skips: Callable[[Point], bool]
    bricks: int = 0
    slope: Slope | None = None


class Search(ABC):
    """Base class of all searches.

    Attributes:
        kind: the name, that of its file.
        chosen_on: the rows that decide, ``validation`` or ``test inputs``.
        follows: whether it follows the gradient of a weighted sum.
        linear: whether it is for weighted sums alone.
        starts: whether the merge's own weights are where it begins.
        module, package: the library that it needs, to import and to install; None for none.
        objective: what is compared: ``metric``, ``loss`` or ``entropy``.
        balance: whether each task's loss counts as a share of its loss at the start.
    """

    kind: ClassVar[str]
    chosen_on: ClassVar[str] = "validation"
    follows: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    starts: ClassVar[bool] = False
    module: ClassVar[str | None] = None
    package: ClassVar[str | None] = None
    objective: str
    balance: bool = False

    @property
    def compared(self) -> str:
        """What is compared, as a person reads it."""
        return "relative loss" if self.balance and self.objective == "loss" else self.objective

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = cls.__module__.rsplit(".", 1)[-1]

    @abstractmethod
    def count(self, problem: Problem) -> int:
        """How many points it proposes."""

    @abstractmethod
    def propose(self, problem: Problem) -> Proposals:
        """Yields points and is sent the cost of each: finite, or infinite for one that is skipped.

        Args:
            problem: axes, start and seed; the same problem and costs give the same points.
        """

    def penalty(self, point: Point) -> float:
        """What is added to the cost of a point."""
        return 0.0


def make_search(section: Mapping[str, Any]) -> Search:
    """The search that a section ``search`` describes."""
    kind = str(section["kind"])
    method: type[Search] = signature.class_of(ROOM, kind, Search)
    return method(**{k: section[k] for k in signature.arguments(ROOM, kind, BASE)})


def clipped(point: Point, axes: Sequence[Axis]) -> list[float]:
    """A point moved into the bounds of its axes."""
    return [
        min(max(value, axis.values[0]), axis.values[-1])
        for value, axis in zip(point, axes, strict=True)
    ]


def lower(costs: Sequence[float]) -> int:
    """The number of the least cost; the first one where several are equal."""
    return min(range(len(costs)), key=lambda at: (math.isnan(costs[at]), costs[at]))
