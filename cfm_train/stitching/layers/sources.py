"""Which backbones a stitch is made from, and which of their layers: names, headers, no torch.

    slices=[DIR_A:0-4, DIR_B:4-8]     layers 0, 1, 2, 3 of A, then 4, 5, 6, 7 of B

The stack of layers is read off the names of the tensors: it is the one group of names that differ
by a number which counts from 0 without a gap (``model.layers.N.…``, ``h.N.…``). Where there is no
such group, or more than one, the model is refused. Tensors are looked up in file headers alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cfm_train.backbone.fingerprint import fingerprint
from cfm_train.backbone.named import backbone_section
from cfm_train.backbone.spec import ResolvedBackbone, resolve
from cfm_train.backbone.tensors import NUMBERED, Placed, placed_tensors, stacks_of
from cfm_train.errors import UserError

_SLICE = re.compile(r"(?P<model>.+):(?P<start>\d+)-(?P<stop>\d+)")


@dataclass(frozen=True)
class Source:
    """A backbone whose layers are taken.

    Attributes:
        label: how the person named it.
        section: the ``backbone`` section that finds it.
        backbone: its folder and config.
        fingerprint: hash of its files.
        stack: what stands before the layer number in the names of its tensors.
        layers: for each layer, the rest of each tensor's name -> where it lies.
        around: every other tensor by name.
    """

    label: str
    section: dict[str, Any]
    backbone: ResolvedBackbone
    fingerprint: str
    stack: str
    layers: list[dict[str, Placed]]
    around: dict[str, Placed]

    @property
    def name(self) -> str:
        """What a sentence calls it."""
        return self.backbone.id


@dataclass(frozen=True)
class Slice:
    """Layers ``start`` to ``stop - 1`` of a source, in this order."""

    source: Source
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.source.name}:{self.start}-{self.stop}"


def open_source(text: str) -> Source:
    """A backbone with the places of all its tensors.

    Raises:
        UserError: it is not there, or its stack of layers cannot be told.
    """
    section = backbone_section(text)
    backbone = resolve(section)
    placed = placed_tensors(backbone)
    stack, count = stack_of(placed, backbone.id)
    layers: list[dict[str, Placed]] = [{} for _ in range(count)]
    around = {}
    for name, place in placed.items():
        match = NUMBERED.fullmatch(name)
        if match and match["stack"] == stack:
            layers[int(match["layer"])][match["rest"]] = place
        else:
            around[name] = place
    return Source(text, section, backbone, fingerprint(backbone.folder), stack, layers, around)


def stack_of(names: Sequence[str] | dict[str, Any], model: str) -> tuple[str, int]:
    """Where the layers of a checkpoint are, from the names of its tensors.

    Args:
        names: the tensors' names.
        model: what a sentence calls the model.

    Returns:
        What stands before the layer number, and how many layers there are.

    Raises:
        UserError: there is no stack of layers, or more than one.
    """
    stacks = stacks_of(names)
    if len(stacks) > 1:  # one of several may be a list of one, such as a projector
        stacks = {stack: n for stack, n in stacks.items() if n > 1} or stacks
    if len(stacks) != 1:
        what = " and ".join(f"'{stack}'" for stack in sorted(stacks)) or "none"
        raise UserError(
            f"The layers of the backbone '{model}' cannot be told from its tensors' names (stacks "
            f"found: {what}): only models with one stack of layers can be stitched."
        )
    return next(iter(stacks.items()))


def read_slices(texts: Sequence[str]) -> list[Slice]:
    """The slices that ``slices=[…]`` names; each backbone is opened once.

    Raises:
        UserError: a text is no slice, a backbone is not there, or it lacks the layers.
    """
    if not texts:
        raise UserError("slices is empty: name at least one, as in slices=[DIR_A:0-4,DIR_B:4-8].")
    opened: dict[str, Source] = {}
    slices = []
    for text in texts:
        match = _SLICE.fullmatch(text.strip())
        if match is None:
            raise UserError(
                f"slices: '{text}' is no slice: write BACKBONE:FIRST-END, as in DIR_A:0-4 for "
                "layers 0, 1, 2 and 3."
            )
        label, start, stop = match["model"], int(match["start"]), int(match["stop"])
        if label not in opened:
            opened[label] = open_source(label)
        source = opened[label]
        count = len(source.layers)
        if not start < stop <= count:
            raise UserError(
                f"slices: '{text}' takes layers {start} to {stop - 1}, but '{source.name}' has "
                f"{count} layers, 0 to {count - 1} (the end is not taken: 0-{count} is all)."
            )
        slices.append(Slice(source, start, stop))
    return slices
