"""A stitched brick: other bricks and a mode, evaluated anew each time something is plugged.

It has no parameters of its own. Where only one of its bricks acts, that brick's plugs go into the
slots as they are; where several meet, the mode makes one plug of theirs:

    low-rank plugs      one low-rank plug (`updates.py`), so that the bank runs it with all others
    site outputs        one function, h ↦ mode(h), computed in float32 where differences are taken
    site inputs         the same on the input
    virtual tokens      side by side, in order

So a stitch is weighed like any brick, by a number or row by row: weight w gives
h + w (stitch(h) − h).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from cfm_train.backbone.plugs import KV, Call, In, Out, Plug, Prompt
from cfm_train.backbone.virtual import length_of
from cfm_train.bricks.bank import LowRank
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.ia3 import IA3
from cfm_train.bricks.peft_modules import overlap
from cfm_train.errors import UserError
from cfm_train.merging.engine import carry_heads
from cfm_train.stitching.mode import Mode, mode_of
from cfm_train.stitching.ports import Part, Place, Port, check_parts, places_of, too_wide
from cfm_train.stitching.updates import Update, update_of

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


class Stitch(Brick):
    """Several bricks as one; made by `stitch_bricks`, never trained.

    Args:
        mode: how they are stitched, the name of a file in this folder.

    Attributes:
        parts: the bricks in order.
        places: where the bricks act, together.
        expression: the configuration with pinned versions that it is opened from; empty for one
            that was made by hand and cannot be stored.
    """

    granularity = "model"
    starts_as_identity = False
    trains = False

    def __init__(self, mode: str) -> None:
        super().__init__(mode=mode)
        self.mode: Mode = mode_of(mode)
        self.parts = nn.ModuleList()
        self.places: tuple[Place, ...] = ()
        self.expression = ""

    def build(self, backbone: Backbone) -> Self:
        """Refused: a stitch has nothing to be built.

        Raises:
            UserError: always.
        """
        raise UserError("A stitch is made from bricks: recipe=stitch/chain bricks=[a,b].")

    def plugs(self) -> Iterable[Plug]:
        """What the bricks put into the slots, joined by the mode where they meet."""
        meeting: dict[tuple[str, bool], list[list[Plug]]] = {}
        for part in self.parts:
            own: dict[tuple[str, bool], list[Plug]] = {}
            for plug in part.plugs():  # type: ignore[operator]
                own.setdefault((plug.site, isinstance(plug, In)), []).append(plug)
            for key, plugs in own.items():
                meeting.setdefault(key, []).append(plugs)
        ports: dict[str, set[str]] = {}
        for place in self.places:
            ports.setdefault(place.site, set()).add(str(place.port))
        for (site, _), found in meeting.items():
            if len(found) == 1 or ports[site] <= self.mode.side_by_side:
                yield from (plug for plugs in found for plug in plugs)
            else:
                yield self._join(site, found)

    def _join(self, site: str, found: Sequence[Sequence[Any]]) -> Plug:
        """One plug for a site where several bricks meet; they are all of one type there."""
        first = found[0][0]
        if isinstance(first, LowRank):
            return self.mode.updates([update_of(plugs) for plugs in found]).plug(site, self)
        if isinstance(first, In):
            return In(site, functools.partial(_input, self.mode, found))
        return Out(site, functools.partial(_output, self.mode, found))

    def updates(self) -> dict[str, Update]:
        """The affine updates of all sites, where the stitch is nothing but that.

        Raises:
            UserError: one of the bricks is no plain low-rank update.
        """
        for place in self.places:
            if place.port != Port.LINEAR:
                raise UserError(
                    f"The {place.what} brick at '{place.site}' cannot be folded into a LoRA: its "
                    "contribution is not B A x of the site's input; leave fold out."
                )
        by_site: dict[str, list[LowRank]] = {}
        for plug in self.plugs():
            assert isinstance(plug, LowRank)
            by_site.setdefault(plug.site, []).append(plug)
        return {site: update_of(plugs) for site, plugs in by_site.items()}

    def foldable(self) -> bool:
        """Whether `updates` answers."""
        return bool(self.places) and all(place.port == Port.LINEAR for place in self.places)

    def virtual_tokens(self) -> int:
        """How many virtual tokens stand before a row: the keys of one site and the embeddings."""
        keys: dict[str, int] = {}
        embeddings: dict[str, int] = {}
        for plug in self.plugs():
            if isinstance(plug, KV):
                keys[plug.site] = keys.get(plug.site, 0) + length_of(plug.keys)
            elif isinstance(plug, Prompt):
                embeddings[plug.site] = embeddings.get(plug.site, 0) + length_of(plug.embeddings)
        return max(keys.values(), default=0) + max(embeddings.values(), default=0)

    def tensors(self) -> dict[str, Tensor]:
        """Those of its bricks, numbered: what it computes depends on nothing else."""
        parts: list[Any] = list(self.parts)
        return {
            f"{number}.{name}": value
            for number, part in enumerate(parts)
            for name, value in part.tensors().items()
        }

    def interface(self) -> dict[str, Any]:
        """The mode and the pinned configuration that it is opened from."""
        return {"kind": self.kind, "hyper": self.hyper, "expression": self.expression}

    def body_files(self) -> dict[str, bytes]:
        """None: the bricks lie in the library already."""
        return {}


def stitch_bricks(
    mode: str, parts: Sequence[Brick], backbone: Backbone, labels: Sequence[str] | None = None
) -> Stitch:
    """One brick from several, with the heads of all of them.

    Args:
        mode: ``chain``, ``pipe``, ``sum`` or ``prompt``.
        parts: the bricks in order; a stitch or a merge may be among them.
        backbone: the backbone that they were made for.
        labels: what a person calls them, for error sentences.

    Returns:
        The stitch, in eval mode; it asks for no gradients.

    Raises:
        UserError: the mode does not exist or cannot stitch these bricks, or two of them bring
            different heads for one task.
    """
    stitched = Stitch(mode)
    if not parts:
        raise UserError("stitch has nothing to stitch: name at least one brick.")
    names = labels or [f"brick {i}" for i in range(1, len(parts) + 1)]
    described = [Part(name, part_places(brick)) for name, brick in zip(names, parts, strict=True)]
    sites = backbone.sites
    check_parts(
        stitched.mode,
        described,
        lambda one, other: overlap(sites[one], sites[other]),
        lambda site: sites[site].module,
    )
    if stitched.mode.square:
        _check_square(stitched.mode, described, backbone)
    stitched.parts.extend(parts)
    stitched.places = tuple(dict.fromkeys(x for part in described for x in part.places))
    acting = {place.site for place in stitched.places}
    stitched.site_names = tuple(name for name in sites if name in acting)
    carry_heads(parts, stitched)
    return stitched.to(backbone.device).eval().requires_grad_(False)


def part_places(brick: Brick) -> tuple[Place, ...]:
    """Where a brick acts."""
    if isinstance(brick, Stitch):
        return brick.places
    if isinstance(brick, IA3):  # it knows which of its sites are inputs
        ports = {True: Port.INPUT, False: Port.OUTPUT}
        return tuple(
            Place(site, ports[site in brick.scaled_inputs], "IA3") for site in brick.site_names
        )
    found = places_of(brick.kind, brick.hyper, brick.site_names)
    if found is None:
        raise UserError(f"A brick of kind {brick.kind} that acts nowhere cannot be stitched.")
    return found


def _check_square(mode: Mode, parts: Sequence[Part], backbone: Backbone) -> None:
    """Refuses linear sites where bricks meet that are not as wide as their input."""
    seen: dict[str, int] = {}
    for number, part in enumerate(parts):  # by number: a brick may follow itself
        for place in part.places:
            site = backbone.sites[place.site]
            met = seen.setdefault(place.site, number)
            if (
                met != number
                and place.port == Port.LINEAR
                and site.in_features != site.out_features
            ):
                labels = parts[met].label, part.label
                raise UserError(
                    too_wide(mode, *labels, place.site, site.in_features, site.out_features)
                )


def _map_of(plugs: Sequence[Any], call: Call, *, at_input: bool) -> Callable[[Tensor], Tensor]:
    """h ↦ h + b(h) of one brick at one site."""

    def apply(h: Tensor) -> Tensor:
        for plug in plugs:
            seen = replace(call, x=h) if at_input else replace(call, y=h)
            h = plug.fn(seen)
        return h

    return apply


def _states(
    mode: Mode, found: Sequence[Sequence[Any]], h: Tensor, call: Call, *, at_input: bool
) -> Tensor:
    # A difference of two values rounded to half precision would be mostly rounding.
    wide = h.float() if mode.subtracts and h.dtype in (torch.bfloat16, torch.float16) else h
    maps = [_map_of(plugs, call, at_input=at_input) for plugs in found]
    return mode.states(wide, maps).to(h.dtype)


def _output(mode: Mode, found: Sequence[Sequence[Any]], call: Call) -> Tensor:
    assert call.y is not None
    return _states(mode, found, call.y, call, at_input=False)


def _input(mode: Mode, found: Sequence[Sequence[Any]], call: Call) -> Tensor:
    return _states(mode, found, call.x, call, at_input=True)
