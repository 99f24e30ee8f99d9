"""The contract of a merge space: as which tensors some bricks are merged, and the way back.

One file in this folder with one subclass of `Space`. A space takes the bricks apart into entries,
tensors that mean the same place in every brick; a rule makes one tensor of each; the space puts the
results together as a new brick.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from cfm_train.bricks.brick import Brick

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


@dataclass(frozen=True)
class Options:
    """What a space is told.

    Attributes:
        rank: the rank of a low-rank result at every site; None for the sum of the parents' ranks.
        fold: where the scale of low-rank factors goes when they are merged one by one.
        scale: λ, the factor of the merged update.
    """

    rank: int | None
    fold: str
    scale: float


@dataclass(frozen=True)
class Entry:
    """One tensor of all bricks.

    Attributes:
        name: its name, the same whatever the order of the bricks.
        site: the site it belongs to, for weights, layers and statistics.
        load: gives the updates ``[N, *shape]``, float32 or float64; a brick that does not touch the
            place has zeros there.
        part: which factor of a low-rank update it is, ``A`` or ``B``; empty for a whole update.
        scales: one number for each brick, where the roots of weight times that number go to the
            factors (see `parameters`).
        statistics: whether statistics of a site's weight belong to it.
    """

    name: str
    site: str
    load: Callable[[], Tensor]
    part: str = ""
    scales: tuple[float, ...] = ()
    statistics: bool = False


@dataclass(frozen=True)
class Result:
    """A merged brick.

    Attributes:
        brick: the brick.
        lost: the largest share of a site's update that truncation to a rank left out, as a relative
            Frobenius norm; None where nothing was truncated.
    """

    brick: Brick
    lost: float | None


class Space(ABC):
    """Base class of all spaces.

    Args:
        bricks: the parents.
        backbone: the backbone they were made for.
        options: rank, fold and λ.

    Attributes:
        flat: whether the singular values of an entry are all alike, so that none is the largest.

    Raises:
        UserError: the bricks have no such form, or not the same.
    """

    kind: ClassVar[str]
    flat: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = cls.__module__.rsplit(".", 1)[-1]

    def __init__(self, bricks: Sequence[Brick], backbone: Backbone, options: Options) -> None:
        self.bricks = list(bricks)
        self.backbone = backbone
        self.options = options

    def refuse_overlap(self) -> None:  # noqa: B027 (most spaces have nothing to refuse)
        """Refuses bricks whose entries share weights, for a rule that must see those at once.

        Raises:
            UserError: two entries are updates of the same weights.
        """

    def breaks(self) -> frozenset[str]:
        """Promises of rules (`rule.PROMISES`) that do not hold in this space for these bricks."""
        return frozenset()

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """What is merged, in the backbone's order."""

    @abstractmethod
    def put(self, entry: Entry, merged: Tensor) -> None:
        """Takes up one entry's merged update; λ is applied here."""

    @abstractmethod
    def result(self) -> Result:
        """The new brick, without heads, when every entry was put."""

    def add_up(self, weights: Callable[[str], Sequence[float]]) -> bool:
        """Does the whole merge as a weighted sum, where the space knows a shorter way than entries.

        Args:
            weights: the weights ``[N]`` of a site.

        Returns:
            Whether it did.
        """
        return False
