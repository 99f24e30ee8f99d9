"""Brick kinds by name: a kind is the one `Brick` subclass in the file of its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cfm_train.bricks.brick import Brick
from cfm_train.config.signature import class_of, kinds
from cfm_train.errors import UserError, nearest

#: Where brick kinds stand: those that ``brick=`` names, then those that operations of their own
#: make.
ROOMS = ("bricks", "modality")


def brick_class(kind: str) -> type[Brick]:
    """The class of a kind.

    Raises:
        UserError: there is no such kind.
    """
    names = {name: room for room in reversed(ROOMS) for name in kinds(room, "Brick")}
    if kind not in names:
        raise UserError(f"There is no brick kind '{kind}'.{nearest(kind, names)}")
    return class_of(names[kind], kind, Brick)


def make_brick(section: Mapping[str, Any]) -> Brick:
    """A new brick from a ``brick`` section: its ``kind`` and the arguments of the kind's class."""
    arguments = {k: v for k, v in section.items() if k not in ("kind", "learning_rate")}
    return brick_class(section["kind"])(**arguments)
