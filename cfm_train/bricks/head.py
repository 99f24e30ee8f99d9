"""The brick that changes nothing: a task head alone, the lower bound of every brick."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

from cfm_train.backbone.plugs import Plug
from cfm_train.bricks.brick import Brick

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


class HeadOnly(Brick):
    """No parameters in the backbone; the heads that every brick may have are all it holds."""

    granularity = "model"

    def __init__(self) -> None:
        super().__init__()

    def build(self, backbone: Backbone) -> Self:
        """Nothing to make."""
        return self

    def plugs(self) -> Iterable[Plug]:
        """Nothing to plug."""
        return ()
