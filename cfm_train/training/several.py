"""Several bricks trained in one run, as one: a connector and a LoRA beside it.

They share the batches, the optimiser and the checkpoints, and are plugged together; in the library
each lies by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor, nn

from cfm_train.backbone.plugs import Plug
from cfm_train.bricks.brick import Brick
from cfm_train.errors import UserError

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


class Several(Brick):
    """Bricks that were built, without heads, in the order in which they are plugged.

    Args:
        parts: the bricks.
    """

    granularity: ClassVar[str] = "model"

    def __init__(self, parts: Iterable[Brick]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.site_names = tuple(
            dict.fromkeys(s for part in self._bricks() for s in part.site_names)
        )

    def _bricks(self) -> list[Brick]:
        return list(self.parts)  # type: ignore[arg-type]

    def build(self, backbone: Backbone) -> Self:
        """Refused: its parts are built already.

        Raises:
            UserError: always.
        """
        raise UserError("Several bricks are trained together from bricks that are built already.")

    def plugs(self) -> Iterable[Plug]:
        """Those of all parts."""
        for part in self._bricks():
            yield from part.plugs()

    def take(self, batch: Mapping[str, Any]) -> None:
        """Hands a batch to the parts that read more of it than its token ids."""
        for part in self._bricks():
            take = getattr(part, "take", None)
            if take is not None:
                take(batch)

    def penalty(self) -> Tensor | None:
        """The sum of what the parts add to a step's loss."""
        found = [each for part in self._bricks() if (each := part.penalty()) is not None]
        return sum(found[1:], found[0]) if found else None

    def after_step(self, step: int, total: int) -> None:
        """Tells every part."""
        for part in self._bricks():
            part.after_step(step, total)
