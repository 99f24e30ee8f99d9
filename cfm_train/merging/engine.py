"""Merging bricks: entries out of a space, groups by scope, the mix on each, a brick back."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from cfm_train.bricks.brick import Brick
from cfm_train.bricks.heads import Head
from cfm_train.bricks.lora import LoRA
from cfm_train.config.signature import class_of
from cfm_train.errors import UserError
from cfm_train.merging.mix import Mix
from cfm_train.merging.rule import per_input
from cfm_train.merging.spaces.low_rank import is_dora
from cfm_train.merging.spaces.parameters import Parameters
from cfm_train.merging.spaces.space import Entry, Options, Result, Space
from cfm_train.merging.weights import Weights, check_matched

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone

#: The statistics of a site's weight, one tensor for each brick.
Statistics = Callable[[str], Sequence[Tensor]]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread for a block: how many share a product or a decomposition shows in the last bits,
    and so in the version of the merge."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
@torch.no_grad()
def merge(
    bricks: Sequence[Brick],
    weights: object,
    mix: Mix,
    backbone: Backbone,
    *,
    sources: Sequence[str] | None = None,
    statistics: Statistics | None = None,
) -> Result:
    """One brick from several, with the heads of all of them.

    Args:
        bricks: the parents.
        weights: one for each (see `weights`); None for the mix's own.
        mix: rule, sparsifier, space, scope and the rest.
        backbone: the backbone they were made for.
        sources: name and version of each parent: what a random sparsifier draws depends on them;
            the place in the list without them.
        statistics: of a site's weight, for rules that need them.

    Returns:
        The brick in eval mode, and what a cut to a rank lost.

    Raises:
        UserError: the bricks, the rule and the space do not go together.
    """
    space = open_space(mix, bricks, backbone)
    given = mix.weights(weights, len(bricks), backbone.sites.layers)
    check_matched(given.filters, _changed(bricks, space))
    if not mix.adds_up:
        space.refuse_overlap()
    if isinstance(space, Parameters) and not _is_average(space, mix, given):
        space.refuse_no_origin()
    if not (mix.adds_up and space.add_up(given.at)):
        _merge_entries(
            space, mix, given, sources or [str(i) for i in range(len(bricks))], statistics
        )
    result = space.result()
    carry_heads(bricks, result.brick)
    result.brick.eval()
    return result


def open_space(mix: Mix, bricks: Sequence[Brick], backbone: Backbone) -> Space:
    """The bricks in the mix's space; ``auto`` takes ``delta`` wherever all have such a form."""
    name = mix.space
    if name == "auto":
        loras = [brick for brick in bricks if isinstance(brick, LoRA)]
        exact = len(loras) == len(bricks) and (mix.rank or not any(map(is_dora, loras)))
        name = "delta" if exact else "parameters"
    space: type[Space] = class_of("merging/spaces", name, Space)
    return space(bricks, backbone, Options(mix.rank, mix.fold, mix.scale))


def _merge_entries(
    space: Space,
    mix: Mix,
    given: Weights,
    sources: Sequence[str],
    statistics: Statistics | None,
) -> None:
    entries = list(space.entries())
    if mix.rule.needs is not None and not any(entry.statistics for entry in entries):
        raise UserError(
            f"rule={mix.rule.kind} goes by {mix.rule.needs} statistics of weights, and merge.space="
            f"{space.kind} has no weights: use low-rank bricks and merge.space=delta."
        )
    if mix.rule.ranks and space.flat:
        raise UserError(
            f"rule={mix.rule.kind} keeps the largest singular values of an update, and in "
            f"merge.space={space.kind} all are alike: use merge.space=delta or merge.space=core."
        )
    for group in mix.groups([(entry.name, entry.site) for entry in entries]):
        members = [entries[number] for number in group]
        merge_members(space, members, mix, given, sources, statistics)


class Taker(Protocol):
    """What merged updates are put into: a space, or the files of a whole model."""

    def put(self, entry: Entry, merged: Tensor) -> None:
        """Takes up one entry's merged update; λ is applied here."""


def merge_members(
    taker: Taker,
    members: Sequence[Entry],
    mix: Mix,
    given: Weights,
    sources: Sequence[str],
    statistics: Statistics | None = None,
) -> None:
    """Merges one group of entries, as many as the mix's scope takes at once.

    Args:
        taker: what the results are put into.
        members: the group.
        mix: the merge.
        given: the weights wherever they are asked for.
        sources: name and version of each input.
        statistics: of a site's weight, for rules that need them.

    Raises:
        UserError: the rule cannot merge them.
    """
    if len(members) == 1:
        _merge_one(taker, members[0], mix, given, sources, statistics)
    else:
        _merge_group(taker, members, mix, given, sources)


def _merge_one(
    space: Taker,
    entry: Entry,
    mix: Mix,
    given: Weights,
    sources: Sequence[str],
    statistics: Statistics | None,
) -> None:
    updates = _updates(entry, mix)
    weights = _weights(entry, mix, given, updates)
    if mix.rule.needs is None or not entry.statistics:
        space.put(entry, mix.merge_updates(updates, weights, entry.name, sources))
    elif statistics is None:
        raise UserError(
            f"rule={mix.rule.kind} needs {mix.rule.needs} statistics of every brick: run "
            f"recipe=analyze/{mix.rule.needs} bricks=[…] first."
        )
    else:
        found = [one.to(updates) for one in statistics(entry.site)]
        space.put(entry, mix.merge_updates(updates, weights, entry.name, sources, found))


def _merge_group(
    space: Taker, members: Sequence[Entry], mix: Mix, given: Weights, sources: Sequence[str]
) -> None:
    """Several tensors as one long vector: their magnitudes and angles are taken over all of it."""
    loaded = [_updates(entry, mix) for entry in members]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in loaded) else torch.float32
    flat = torch.cat([one.reshape(len(one), -1).to(dtype) for one in loaded], dim=1)
    each = [_weights(entry, mix, given, flat) for entry in members]
    if all(torch.equal(one, each[0]) for one in each):
        weights = each[0]
    else:
        sizes = [one[0].numel() for one in loaded]
        parts = [one[:, None].expand(-1, n) for one, n in zip(each, sizes, strict=True)]
        weights = torch.cat(parts, dim=1)
    name = "\n".join(entry.name for entry in members)
    merged = mix.merge_updates(flat, weights, name, sources)
    for entry, part, one in zip(
        members, merged.split([one[0].numel() for one in loaded]), loaded, strict=True
    ):
        space.put(entry, part.view(one.shape[1:]))


def _updates(entry: Entry, mix: Mix) -> Tensor:
    """An entry's updates; the roots of the scales are in them where they are in no weight."""
    updates = entry.load()
    if not entry.scales or mix.rule.multiplies:
        return updates
    roots = torch.tensor(entry.scales, dtype=updates.dtype, device=updates.device).sqrt()
    return updates * per_input(roots, updates)


def _weights(entry: Entry, mix: Mix, given: Weights, like: Tensor) -> Tensor:
    weights = mix.factor_weights(given.at(entry.site), entry.part, entry.scales)
    return torch.tensor(weights, dtype=like.dtype, device=like.device)


def _changed(bricks: Sequence[Brick], space: Space) -> set[str]:
    """What filters may match: the bricks' sites, or parameters that belong to none."""
    sites = {site for brick in bricks for site in brick.site_names}
    own = space.entries() if isinstance(space, Parameters) else ()
    return sites | {entry.site for entry in own}


def _is_average(space: Parameters, mix: Mix, given: Weights) -> bool:
    """Whether the result is an average, the same wherever updates are measured from."""
    sums = (math.fsum(given.at(entry.site)) for entry in space.entries())
    return mix.adds_up and mix.scale == 1 and all(abs(one - 1) < 1e-6 for one in sums)


def carry_heads(bricks: Sequence[Brick], merged: Brick) -> None:
    """Gives a merged brick the heads of all its parents.

    Raises:
        UserError: two of them bring different heads for one task.
    """
    for brick in bricks:
        for task, head in brick.heads.items():
            other = merged.head_for(task)
            if other is not None and not _same(other, head):
                raise UserError(
                    f"Two of the bricks bring different heads for '{task}', and heads are not "
                    "averaged: leave one of the bricks out."
                )
            merged.add_head(task, head)


def _same(one: Head, other: Head) -> bool:
    """Whether two heads are one: a brick and a merge of it carry the same."""
    a, b = one.state_dict(), other.state_dict()
    return one.describe() == other.describe() and all(torch.equal(a[k], b[k]) for k in a)
