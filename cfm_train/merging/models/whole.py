"""Merging a tensor (or a group of them) at a time, for rules that must see all of it.

The same steps as for bricks (`engine.merge_members`); what a group needs of memory is told before
anything is read, and as many groups are merged at a time as fit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cfm_train.errors import UserError
from cfm_train.merging.engine import merge_members
from cfm_train.merging.models.files import DTYPES, Reader, Writer, numbers_in
from cfm_train.merging.models.task import Task
from cfm_train.merging.spaces.space import Entry


class Whole:
    """Merges groups of tensors, each in memory as a whole.

    Args:
        task: the merge.
        reader: the models.
        writer: the new model.
    """

    def __init__(self, task: Task, reader: Reader, writer: Writer) -> None:
        self.task = task
        self.reader = reader
        self.writer = writer

    def merge(self, names: Sequence[str]) -> None:
        """Merges one group.

        Raises:
            UserError: the rule cannot merge it, or a number of the result is not finite.
        """
        task = self.task
        members = [Entry(name, name, functools.partial(self._load, name)) for name in names]
        merge_members(self, members, task.mix, task.weights, task.sources)

    def put(self, entry: Entry, merged: Tensor) -> None:
        """Writes one tensor."""
        name = entry.name
        base = None if self.task.base is None else self._read(self.task.base, name)
        result = torch.empty(merged.shape, dtype=DTYPES[self.task.plan.dtypes[name]])
        self.task.finish(name, merged, base, result)
        self.writer.write(name, 0, result.view(-1))

    def _load(self, name: str) -> Tensor:
        updates = torch.stack([self._read(tensors, name) for tensors in self.task.inputs])
        return updates if self.task.base is None else updates.sub_(self._read(self.task.base, name))

    def _read(self, tensors: object, name: str) -> Tensor:
        placed = tensors[name]  # type: ignore[index]
        found = torch.empty(placed.info.shape, dtype=self.task.dtype)
        self.reader.read(placed, 0, found.view(-1))
        return found


def workers(task: Task, groups: Sequence[Sequence[str]], threads: int) -> int:
    """How many groups can be merged at a time.

    Raises:
        UserError: not even one: the sentence names the group and what it needs.
    """
    needs = [_need(task, names) for names in groups]
    free = free_memory()
    if free is None or not needs:
        return threads
    most = max(needs)
    if most > free:
        names = groups[needs.index(most)]
        what = f"'{names[0]}'" if len(names) == 1 else f"'{names[0]}' to '{names[-1]}'"
        raise UserError(
            f"rule={task.mix.rule.kind} with sparsify={task.mix.sparsifier.kind} needs about "
            f"{most / 2**30:.1f} GB of memory for {what}, and {free / 2**30:.1f} are free: use a "
            "smaller merge.scope, or a rule that goes by number (linear, ties)."
        )
    return max(1, min(threads, free // most))


def _need(task: Task, names: Sequence[str]) -> int:
    """Bytes that a group takes at its height: updates, what is kept of them, what is made of
    them."""
    count = sum(numbers_in(task.inputs[0][name]) for name in names)
    width = 8 if task.mix.rule.matrices else task.dtype.itemsize
    copies = (3 if len(names) > 1 or task.mix.rule.matrices else 2) * len(task.inputs) + 6
    return count * width * copies


def free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None
