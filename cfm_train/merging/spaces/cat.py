"""Concatenation: the exact sum of low-rank updates, at the sum of their ranks.

``A`` is the parents' A stacked, ``B`` their scaled and weighted B side by side. Only a weighted sum
can be had this way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cfm_train.bricks.brick import Brick
from cfm_train.errors import UserError
from cfm_train.merging.spaces.delta import Delta
from cfm_train.merging.spaces.low_rank import is_dora
from cfm_train.merging.spaces.space import Entry, Options

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


class Cat(Delta):
    """The sum of updates, nothing cut."""

    def __init__(self, bricks: Sequence[Brick], backbone: Backbone, options: Options) -> None:
        if options.rank is not None:
            raise UserError(
                "merge.space=cat keeps every rank: leave merge.rank out, or use merge.space=delta."
            )
        super().__init__(bricks, backbone, options)
        if any(map(is_dora, self.loras)):
            raise UserError(
                "The update of a DoRA brick has full rank, so it cannot be concatenated: use "
                "merge.space=delta with merge.rank=16 or another rank."
            )

    def entries(self) -> Iterator[Entry]:
        """None: a rule that looks at entries needs another space.

        Raises:
            UserError: always.
        """
        raise UserError(
            "merge.space=cat adds updates up as they are: it goes with rule=linear or "
            "rule=task_arithmetic and sparsify=none; use merge.space=delta."
        )
