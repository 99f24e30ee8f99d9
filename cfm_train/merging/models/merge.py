"""Whole models in, a new model folder out.

merge_models(task, out, companion=…, texts=…, shard_bytes=…, threads=…)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from cfm_train.backbone.folders import lay_out, write_around, written_aside
from cfm_train.library.tensorfile import pieces
from cfm_train.merging.models.files import Reader, Writer
from cfm_train.merging.models.streaming import Streaming, goes_by_number
from cfm_train.merging.models.task import Task
from cfm_train.merging.models.whole import Whole, workers


@torch.no_grad()
def merge_models(
    task: Task,
    out: Path,
    *,
    companion: Path,
    texts: Mapping[str, str],
    shard_bytes: int,
    threads: int,
) -> None:
    """Merges models into a new transformers folder, which is there when it is whole.

    The bytes written are a function of the inputs and the choices alone: not of how the inputs lie
    in files, of threads, or of anything that a process draws.

    Args:
        task: the merge.
        out: the folder; it must not exist, or be empty.
        companion: the model folder whose tokenizer and generation config are copied.
        texts: further files, such as ``config.json``.
        shard_bytes: most bytes of one weight file.
        threads: how many threads merge.

    Raises:
        UserError: the rule cannot merge these tensors, memory does not suffice, or a result is not
            finite; ``out`` is not made then.
    """
    groups = task.groups()
    number_by_number = goes_by_number(task.mix, task.dtype)
    if not number_by_number:
        threads = workers(task, groups, threads)
    first, dtypes = task.inputs[0], task.plan.dtypes
    shards, index = lay_out(
        {name: (dtype, first[name].info.shape) for name, dtype in dtypes.items()}, shard_bytes
    )
    with (
        written_aside(out) as folder,
        Reader() as reader,
        Writer(folder, shards) as writer,
        _threads(threads) as pool,
    ):
        if number_by_number:
            Streaming(task, reader, writer, pool).merge(groups)
        else:
            for _ in pool.map(Whole(task, reader, writer).merge, groups):
                pass
        for name, other in task.plan.twins.items():
            writer.repeat(other, name)
        _copy(task, task.plan.copied, writer)
        write_around(folder, companion, {**index, **texts})


def rehearse(task: Task, threads: int) -> None:
    """What can be known before anything is read.

    Raises:
        UserError: as `merge_models`, for reasons of rule, scope, and memory.
    """
    groups = task.groups()
    if not goes_by_number(task.mix, task.dtype):
        workers(task, groups, threads)


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads of one core each: a pool inside of a pool would only wait for itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(count, initializer=functools.partial(torch.set_num_threads, 1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _copy(task: Task, names: Sequence[str], writer: Writer) -> None:
    for name in names:
        placed, at = task.inputs[0][name], 0
        with placed.file.open("rb") as file:
            for piece in pieces(file, placed.info):
                writer.write_bytes(name, at, piece)
                at += len(piece)
