"""Batches by token budget and length; a batch is a function of the seed and the micro-step alone.

Rows of nearly the same length share a batch, so that little of it is padding; which rows those are
and in which order the batches come is drawn anew each epoch. Every row comes exactly once an epoch.
Nothing is remembered between calls but what can be computed again, so a run that was killed goes on
with the very batches that it would have had.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from cfm_train.data.encode import Encoded
from cfm_train.data.tasks import IGNORED

#: Rows that are sorted by length together, in batches: enough to find equals, few enough to mix.
POOL = 64


def plan_epoch(
    lengths: np.ndarray,
    *,
    tokens_per_batch: int,
    rows_per_batch: int,
    seed: int | Sequence[int],
    epoch: int,
) -> list[np.ndarray]:
    """The batches of one epoch, in order.

    Args:
        lengths: tokens of each row, int [rows], or [rows, 2] where both sides of a row count.
        tokens_per_batch: most tokens of a batch, padding included; a longer row comes alone.
        rows_per_batch: most rows of a batch.
        seed: draws the mixture and the order, together with ``epoch``.
        epoch: number of the pass over the data, from 0.

    Returns:
        Row numbers, int64 [rows of the batch] each; together every row exactly once.
    """
    sides = lengths.reshape(len(lengths), -1).astype(np.int64)
    generator = np.random.default_rng([*np.atleast_1d(seed), epoch])
    order = generator.permutation(len(sides))
    total = sides.sum(axis=-1)
    mean = max(1.0, float(total.mean())) if len(total) else 1.0
    pool = POOL * int(np.clip(tokens_per_batch / mean, 1, rows_per_batch))
    batches: list[np.ndarray] = []
    for start in range(0, len(order), pool):
        rows = order[start : start + pool]
        # A stable sort keeps rows of equal length in their drawn order.
        rows = rows[np.argsort(-total[rows], kind="stable")]
        batches += _cut(rows, sides, tokens_per_batch, rows_per_batch)
    return [batches[i] for i in generator.permutation(len(batches))]


def _cut(rows: np.ndarray, sides: np.ndarray, tokens: int, most: int) -> list[np.ndarray]:
    """Cuts rows, sorted by length, into batches within the two limits, padding included."""
    batches, start, width = [], 0, np.zeros(sides.shape[1], np.int64)
    for position, row in enumerate(rows):
        wider = np.maximum(width, sides[row])
        count = position - start + 1
        if count > 1 and (count > most or count * wider.sum() > tokens):
            batches.append(rows[start:position])
            start, wider = position, sides[row]
        width = wider
    if start < len(rows):
        batches.append(rows[start:])
    return batches


def in_order(
    lengths: np.ndarray, *, tokens_per_batch: int, rows_per_batch: int
) -> list[np.ndarray]:
    """Batches for evaluation: every row once, by length, the longest first, nothing drawn."""
    sides = lengths.reshape(len(lengths), -1).astype(np.int64)
    return _cut(
        np.argsort(-sides.sum(axis=-1), kind="stable"), sides, tokens_per_batch, rows_per_batch
    )


def padding_share(lengths: np.ndarray, batches: Sequence[np.ndarray]) -> float:
    """The share of all computed tokens that is padding, from 0 to 1."""
    sides = lengths.reshape(len(lengths), -1)
    computed = sum(len(rows) * int(sides[rows].max(axis=0).sum()) for rows in batches)
    return 1.0 - float(sides.sum()) / computed if computed else 0.0


def collate(encoded: Encoded, indices: np.ndarray, pad_id: int) -> dict[str, torch.Tensor]:
    """One batch as tensors, padded on the right.

    Args:
        encoded: the split that the rows are of.
        indices: row numbers, int [batch].
        pad_id: the tokenizer's padding token.

    Returns:
        ``input_ids`` and ``attention_mask`` int64 [batch, seq]; ``index`` int64 [batch]; where the
        task has them ``labels`` (int64 [batch]; float32 [batch] or [batch, labels]; int64
        [batch, seq] with -100 where nothing is learnt; int64 [batch, target seq] for sequence to
        sequence), ``token_type_ids`` and ``position_ids`` int64 [batch, seq]; ``context_ids`` and
        ``context_mask`` int64 [batch, context], padded on the left so that each ends where its row
        begins.
    """
    batch = {"input_ids": _pad(encoded, "input_ids", indices, pad_id)}
    widths = torch.from_numpy(np.diff(encoded.arrays["offsets"])[indices])
    columns = torch.arange(batch["input_ids"].shape[1])
    batch["attention_mask"] = (columns[None, :] < widths[:, None]).long()
    for name, key, fill in (
        ("token_type_ids", "token_type_ids", 0),
        ("position_ids", "position_ids", 0),
        ("token_labels", "labels", IGNORED),
        ("target_ids", "labels", IGNORED),
    ):
        if name in encoded.arrays:
            batch[key] = _pad(encoded, name, indices, fill)
    if "context_ids" in encoded.arrays:
        batch["context_ids"] = _pad(encoded, "context_ids", indices, pad_id, left=True)
        widths = torch.from_numpy(np.diff(encoded.arrays["context_offsets"])[indices])
        columns = torch.arange(batch["context_ids"].shape[1]).flip(0)
        batch["context_mask"] = (columns[None, :] < widths[:, None]).long()
    if "labels" in encoded.arrays:
        batch["labels"] = torch.from_numpy(np.array(encoded.arrays["labels"][indices]))
    batch["index"] = torch.from_numpy(np.asarray(indices, np.int64))
    return batch


def _pad(
    encoded: Encoded, name: str, indices: np.ndarray, fill: int, *, left: bool = False
) -> torch.Tensor:
    parts = [encoded.slice(name, int(i)) for i in indices]
    width = max(len(part) for part in parts)
    padded = np.full((len(parts), width), fill, np.int64)
    for row, part in zip(padded, parts, strict=True):
        start = width - len(part) if left else 0
        row[start : start + len(part)] = part
    return torch.from_numpy(padded)


class BatchStream:
    """Training batches without end, each a pure function of its number; every batch is of one task.

    With ``mixture`` 1 an epoch is every row of every task once. Else an epoch has as many batches,
    but task k gets a share of them in proportion to ``rows_k ** mixture`` (Raffel et al. 2020,
    §3.5.2: temperature 1 / mixture); 0 is the same for all. Each goes through its rows in turn.

    Args:
        lengths: task name -> lengths of its training rows (see ``plan_epoch``).
        tokens_per_batch: see ``plan_epoch``.
        rows_per_batch: see ``plan_epoch``.
        seed: see ``plan_epoch``.
        mixture: exponent of the tasks' sizes, 0 or more; without effect on a single task.
    """

    def __init__(
        self,
        lengths: Mapping[str, np.ndarray],
        *,
        tokens_per_batch: int,
        rows_per_batch: int,
        seed: int,
        mixture: float = 1.0,
    ) -> None:
        self.seed = seed
        self.tasks = {
            name: _TaskBatches(sizes, tokens_per_batch, rows_per_batch, (seed, number))
            for number, (name, sizes) in enumerate(lengths.items())
        }
        self.counts: dict[str, int] | None = None  # batches of each task in an epoch, where fixed
        if mixture != 1.0 and len(lengths) > 1:
            total = sum(len(task.plan(0)) for task in self.tasks.values())
            weights = {name: float(len(sizes)) ** mixture for name, sizes in lengths.items()}
            whole = sum(weights.values())
            self.counts = {name: max(1, round(total * w / whole)) for name, w in weights.items()}
        self._starts = [0]  # the micro-step at which each epoch begins, as far as it is known
        self._plan: tuple[int, list[tuple[str, np.ndarray]]] | None = None

    def epoch_plan(self, epoch: int) -> list[tuple[str, np.ndarray]]:
        """The batches of one epoch over all tasks: task name and row numbers each."""
        if self._plan is None or self._plan[0] != epoch:
            plan = []
            for name, task in self.tasks.items():
                if self.counts is None:
                    plan += [(name, rows) for rows in task.plan(epoch)]
                else:
                    count = self.counts[name]
                    plan += [(name, task.at(epoch * count + i)) for i in range(count)]
            if len(self.tasks) > 1:
                order = np.random.default_rng([self.seed, len(self.tasks), epoch]).permutation(
                    len(plan)
                )
                plan = [plan[i] for i in order]
            self._plan = (epoch, plan)  # one epoch at a time is in use
        return self._plan[1]

    def start(self, epoch: int) -> int:
        """The micro-step at which an epoch begins."""
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + len(self.epoch_plan(len(self._starts) - 1)))
        return self._starts[epoch]

    def steps(self, epochs: float) -> int:
        """Micro-steps of so many epochs; a part of an epoch counts by its share of the batches."""
        whole = int(epochs)
        begin = self.start(whole)
        if epochs == whole:
            return begin
        return begin + round((epochs - whole) * (self.start(whole + 1) - begin))

    def epoch_of(self, micro_step: int) -> int:
        """The epoch that a micro-step is in, from 0."""
        epoch = bisect.bisect_right(self._starts, micro_step) - 1
        while self.start(epoch + 1) <= micro_step:
            epoch += 1
        return epoch

    def batch_at(self, micro_step: int) -> tuple[str, np.ndarray]:
        """The batch of one micro-step, from 0: its task, and the numbers of its rows."""
        epoch = self.epoch_of(micro_step)
        return self.epoch_plan(epoch)[micro_step - self.start(epoch)]


class _TaskBatches:
    """The batches of one task, epoch after epoch."""

    def __init__(self, lengths: np.ndarray, tokens: int, rows: int, seed: Sequence[int]) -> None:
        self.lengths, self.tokens, self.rows, self.seed = lengths, tokens, rows, seed
        self.starts = [0]
        self.kept: tuple[int, list[np.ndarray]] | None = None

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The batches of one of the task's own epochs."""
        if self.kept is None or self.kept[0] != epoch:
            plan = plan_epoch(
                self.lengths,
                tokens_per_batch=self.tokens,
                rows_per_batch=self.rows,
                seed=self.seed,
                epoch=epoch,
            )
            self.kept = (epoch, plan)
        return self.kept[1]

    def at(self, number: int) -> np.ndarray:
        """The task's batch of that number, counted over its own epochs."""
        while self.starts[-1] <= number:
            self.starts.append(self.starts[-1] + len(self.plan(len(self.starts) - 1)))
        epoch = bisect.bisect_right(self.starts, number) - 1
        return self.plan(epoch)[number - self.starts[epoch]]
