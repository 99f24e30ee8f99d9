"""Training data as an endless stream of optimiser steps, each a function of its number alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset

from cfm_train.data.batches import BatchStream, collate, in_order
from cfm_train.data.encode import Encoded
from cfm_train.data.tasks import IGNORED
from cfm_train.training.objectives import BESIDE, Batch


def make_batch(task: str, encoded: Encoded, indices: object, pad_id: int) -> Batch:
    """A collated batch that knows its task and its real tokens: the input's, and the decoder's."""
    batch: Batch = dict(collate(encoded, indices, pad_id))  # type: ignore[arg-type]
    batch |= encoded.extras(indices)  # type: ignore[arg-type]
    batch["task"] = task
    batch["tokens"] = int(batch["attention_mask"].sum())
    generates = "target_ids" in encoded.arrays
    batch["targets"] = int((batch["labels"] != IGNORED).sum()) if generates else 0
    return batch


def plan_steps(stream: BatchStream, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Optimiser steps of the run, and between two validations.

    Args:
        stream: the training batches.
        settings: the ``trainer`` section.
    """
    accumulate = settings["accumulate"]
    epoch = max(1, math.ceil(stream.steps(1) / accumulate))
    total = settings["max_steps"] or max(
        1, math.ceil(stream.steps(settings["epochs"]) / accumulate)
    )
    return total, min(total, settings["validate_every"] or epoch)


@dataclass(frozen=True)
class Beside:
    """Rows that come beside those of a step, see `objectives.Learning`.

    Attributes:
        stream: which of them make up which micro-step.
        rows: the rows.
    """

    stream: BatchStream
    rows: Encoded


class StepDataset(IterableDataset):
    """Groups of micro-batches, one group for each optimiser step, without end.

    Args:
        stream: which rows make up which micro-step.
        splits: training rows by task name.
        accumulate: micro-batches of one optimiser step.
        pad_id: the tokenizer's padding token.
        beside: batches of other rows, of which each micro-batch gets one beside it; None for none.

    Attributes:
        start: the step that iteration begins with; a resumed run sets it.
    """

    def __init__(
        self,
        stream: BatchStream,
        splits: Mapping[str, Encoded],
        accumulate: int,
        pad_id: int,
        beside: Beside | None = None,
    ) -> None:
        self.beside = beside
        self.stream = stream
        self.splits = splits
        self.accumulate = accumulate
        self.pad_id = pad_id
        self.start = 0

    def group_at(self, step: int) -> list[Batch]:
        """The micro-batches of one optimiser step."""
        group = []
        for micro in range(step * self.accumulate, (step + 1) * self.accumulate):
            task, indices = self.stream.batch_at(micro)
            group.append(make_batch(task, self.splits[task], indices, self.pad_id))
            if self.beside is not None:
                _, indices = self.beside.stream.batch_at(micro)
                group.append(make_batch(BESIDE, self.beside.rows, indices, self.pad_id))
        return group

    def __iter__(self) -> Iterator[list[Batch]]:
        step = self.start
        while True:
            yield self.group_at(step)
            step += 1


def evaluation_tokens(device: torch.device) -> int:
    """Padded tokens of a batch without gradients, which decide speed alone.

    Args:
        device: where the backbone is. A CPU is fastest while a batch's activations stay in its
            caches (MiniLM in float32: 1,024 tokens take 0.6 to 0.7 of the time that 8,192 take).
    """
    return 1024 if device.type == "cpu" else 8192


class EvaluationDataset(IterableDataset):
    """Every row of some splits once, in batches of nearly equal length, the longest first.

    Args:
        splits: rows by task name.
        tokens_per_batch: most tokens of a batch, padding included.
        pad_id: the tokenizer's padding token.
    """

    def __init__(self, splits: Mapping[str, Encoded], tokens_per_batch: int, pad_id: int) -> None:
        self.splits = splits
        self.pad_id = pad_id
        self.plan = [
            (task, rows)
            for task, encoded in splits.items()
            for rows in in_order(
                encoded.lengths, tokens_per_batch=tokens_per_batch, rows_per_batch=4096
            )
        ]

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        for task, rows in self.plan:
            yield make_batch(task, self.splits[task], rows, self.pad_id)
