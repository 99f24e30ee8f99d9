"""Merging number by number: a few models' pieces in, a piece of the new model out.

    read a chunk of each model ─► minus the base ─► trim ─► rule ─► λ, plus the base ─► cast, write

It is the arithmetic of `mix.Mix` on chunks that stay in a core's cache, so for a rule and a
sparsifier that look at one place at a time the result is the same to the bit, and memory does not
grow with the model. A trim needs its thresholds first (`trim.py`): two more passes.
Pieces go to threads of one core each; what they compute does not depend on which takes which.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

from cfm_train.merging.mix import Mix
from cfm_train.merging.models import trim
from cfm_train.merging.models.files import CHUNK, DTYPES, Reader, Writer, numbers_in
from cfm_train.merging.models.task import Task
from cfm_train.merging.rule import Facts

#: Numbers that one thread merges before it takes the next piece.
PIECE = 4 * CHUNK


@dataclass(frozen=True)
class Piece:
    """Numbers ``start`` to ``stop - 1`` of a tensor, flat."""

    name: str
    start: int
    stop: int

    def chunks(self) -> Iterator[tuple[int, int]]:
        """First number and length of every chunk."""
        for start in range(self.start, self.stop, CHUNK):
            yield start, min(CHUNK, self.stop - start)


def goes_by_number(mix: Mix, dtype: torch.dtype) -> bool:
    """Whether a merge can be done a chunk at a time, in a dtype."""
    if not mix.rule.elementwise:
        return False
    # A threshold is found by the bits of float32.
    trims = mix.sparsifier.keeps(1) is not None and dtype == torch.float32
    return mix.sparsifier.elementwise or trims


class Streaming:
    """Merges groups of tensors a chunk at a time.

    Args:
        task: the merge; see `goes_by_number`.
        reader: the models.
        writer: the new model.
        pool: the threads.
    """

    def __init__(self, task: Task, reader: Reader, writer: Writer, pool: Executor) -> None:
        self.task = task
        self.reader = reader
        self.writer = writer
        self.pool = pool
        self._own = threading.local()

    def merge(self, groups: Sequence[Sequence[str]]) -> None:
        """Merges groups of tensors; each group is trimmed as one.

        Raises:
            UserError: a number of the result is not finite.
        """
        task = self.task
        if task.mix.sparsifier.elementwise:
            pieces = [piece for names in groups for piece in self._pieces(names)]
            for _ in self.pool.map(self._merge_piece, pieces):
                pass
            return
        for names in groups:
            pieces = self._pieces(names)
            cuts = self._cuts(pieces)
            befores = [[cut.before[number] for cut in cuts] for number in range(len(pieces))]
            for _ in self.pool.map(
                lambda p, b, c=cuts: self._merge_piece(p, c, b), pieces, befores
            ):
                pass

    def _pieces(self, names: Sequence[str]) -> list[Piece]:
        found = []
        for name in names:
            count = numbers_in(self.task.inputs[0][name])
            starts = range(0, count, PIECE)
            found += [Piece(name, start, min(start + PIECE, count)) for start in starts]
        return found

    def _cuts(self, pieces: Sequence[Piece]) -> list[trim.Cut]:
        """Where each input's update is cut off; none where everything is kept."""
        whole = sum(piece.stop - piece.start for piece in pieces)
        keep = self.task.mix.sparsifier.keeps(whole)
        assert keep is not None
        if keep >= whole:
            return []
        inputs = range(len(self.task.inputs))
        if keep <= 0:
            return [trim.Cut(float("inf"), float("inf"), 0, [0] * len(pieces)) for _ in inputs]
        counts = torch.zeros(len(inputs), trim.BINS, dtype=torch.int64)
        for found in self.pool.map(self._histograms, pieces):
            counts += found
        places = [trim.place(counts[number], keep) for number in inputs]
        lows = list(self.pool.map(lambda piece: self._low_bits(piece, places), pieces))
        return [trim.cut(places[number], [low[number] for low in lows]) for number in inputs]

    def _histograms(self, piece: Piece) -> Tensor:
        """``[N, bins]`` int64 of one piece."""
        high = torch.empty(len(self.task.inputs), piece.stop - piece.start, dtype=torch.int32)
        for start, count in piece.chunks():
            at = start - piece.start
            for row, update in zip(high, self._updates(piece.name, start, count), strict=True):
                trim.high_bits(update, row[at : at + count])
        return torch.stack([trim.histogram(row) for row in high])

    def _low_bits(self, piece: Piece, places: Sequence[trim.Place]) -> list[trim.Counts]:
        """The lower bits of what lies in each input's bin."""
        found: list[list[trim.Counts]] = [[] for _ in places]
        high = torch.empty(CHUNK, dtype=torch.int32)
        for start, count in piece.chunks():
            for number, update in enumerate(self._updates(piece.name, start, count)):
                trim.high_bits(update, high[:count])
                found[number].append(trim.low_bits(update, high[:count], places[number]))
        return [trim.joined(parts) for parts in found]

    def _merge_piece(
        self, piece: Piece, cuts: Sequence[trim.Cut] = (), before: Sequence[int] = ()
    ) -> None:
        task, seen = self.task, list(before)
        weights = torch.tensor(task.weights.at(piece.name), dtype=task.dtype)
        result = torch.empty(piece.stop - piece.start, dtype=DTYPES[task.plan.dtypes[piece.name]])
        for start, count in piece.chunks():
            updates = self._updates(piece.name, start, count)
            for number, cut in enumerate(cuts):
                seen[number] = trim.trim(updates[number], cut, seen[number])
            if task.mix.sparsifier.elementwise:
                merged = task.mix.merge_updates(updates, weights, piece.name, task.sources)
            else:
                merged = task.mix.rule.combine(updates, weights, Facts(piece.name))
            base = None if task.base is None else self._buffers()[1][:count]
            at = start - piece.start
            task.finish(piece.name, merged, base, result[at : at + count])
        self.writer.write(piece.name, piece.start, result)

    def _updates(self, name: str, start: int, count: int) -> Tensor:
        """A chunk of every input's update, ``[N, n]``, in the thread's own buffer."""
        task = self.task
        wide, base = self._buffers()
        updates = wide[: len(task.inputs) * count].view(-1, count)
        if task.base is not None:
            self.reader.read(task.base[name], start, base[:count])
        for update, tensors in zip(updates, task.inputs, strict=True):
            self.reader.read(tensors[name], start, update)
            if task.base is not None:
                update.sub_(base[:count])
        return updates

    def _buffers(self) -> tuple[Tensor, Tensor]:
        own, task = self._own, self.task
        if not hasattr(own, "updates"):
            own.updates = torch.empty(len(task.inputs) * CHUNK, dtype=task.dtype)
            own.base = torch.empty(CHUNK, dtype=task.dtype)
        return own.updates, own.base
