"""The contract of a stitching mode: how several bricks become one, without changing any of them.

A mode is one file in this folder with one subclass of `Mode`; its name is the file's name. A brick
is a contribution b to a value h of the backbone (`ports.py` says what h is for which kind), and a
mode says what happens to h. No torch at import: a mode's name and its checks come before it.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from cfm_train.config.signature import class_of, kinds
from cfm_train.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from cfm_train.stitching.updates import Update


class Mode(ABC):
    """Base class of all modes.

    Attributes:
        name: the mode's name, that of its file.
        everywhere: whether every brick must act on every site; else one that is absent is the
            identity there.
        square: whether a linear site where bricks meet must be as wide as its input.
        subtracts: whether `states` takes differences, so that half precision is not enough for it.
        tokens: whether it joins virtual tokens, keys and values, and nothing else.
        ordered: whether the order of the bricks matters.
        meets: groups of ports (`ports.Port`) whose bricks may meet at one site.
        side_by_side: ports at which bricks are simply plugged together.
    """

    name: ClassVar[str]
    everywhere: ClassVar[bool] = False
    square: ClassVar[bool] = False
    subtracts: ClassVar[bool] = False
    tokens: ClassVar[bool] = False
    ordered: ClassVar[bool] = True
    meets: ClassVar[tuple[frozenset[str], ...]] = ()
    side_by_side: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__module__.rsplit(".", 1)[-1]
        joined = frozenset().union(*cls.meets) - cls.side_by_side
        for ports, method in (({"linear"}, "updates"), ({"output", "input"}, "states")):
            if ports & joined and getattr(cls, method) is getattr(Mode, method):
                raise TypeError(
                    f"{cls.__name__} joins bricks at {sorted(ports & joined)} without {method}()."
                )

    # A mode has those of the two that its ports ask for, as the class itself is checked for: what
    # is plugged side by side, and virtual tokens, are never joined, so neither raises in a run.

    def updates(self, found: Sequence[Update]) -> Update:
        """One affine update of a linear site from several, in order (port ``linear``)."""
        raise NotImplementedError

    def states(self, h: Tensor, maps: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        """The new h (ports ``output`` and ``input``).

        Args:
            h: ``[batch, seq, features]``.
            maps: for each brick h ↦ h + b(h), in order.
        """
        raise NotImplementedError


def modes() -> tuple[str, ...]:
    """The names of all modes."""
    return kinds("stitching", "Mode")


def mode_of(name: object) -> Mode:
    """The mode of a name.

    Raises:
        UserError: there is no such mode.
    """
    known = modes()
    if name not in known:
        raise UserError(f"mode: there is no stitching mode '{name}'.{nearest(str(name), known)}")
    mode: type[Mode] = class_of("stitching", str(name), Mode)
    return mode()
