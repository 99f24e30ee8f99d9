"""Trials of a search, each kept as soon as it is done: a search that was killed goes on.

    trials.jsonl ─► the same proposals, sent the costs that were kept ─► points not tried yet

Proposals are a function of the costs that they are sent, so the walk through them is repeated and
only the trials, which answer rows, are taken from the file. A search that follows gradients has its
steps to do again on the way. Where a proposal is not the point that was kept, to the bit (another
machine rounds in another way), what was kept from there on is of no use and is tried anew.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from cfm_train.operations.bench import Bench, Tried
from cfm_train.tracking.atomic import append_line, replace_file


def trials(bench: Bench, path: Path) -> Iterator[Tried]:
    """Every point that the bench's search proposes, tried now or by an earlier start.

    Args:
        bench: where points are tried; the same for all starts.
        path: the file of trials, one in a line; made if it is not there.

    Raises:
        OSError: the file cannot be written.
    """
    kept, fresh = read(path), False
    proposals = bench.search.propose(bench.problem)
    point = next(proposals)
    for number in itertools.count():
        if not fresh and number < len(kept) and _same(kept[number].point, list(point)):
            tried = kept[number]
        else:
            if not fresh:  # a torn line goes, and all that is of no use
                replace_file(path, "".join(f"{_line(one)}\n" for one in kept[:number]).encode())
                fresh = True
            tried = bench.try_out(point)
            append_line(path, _line(tried))
        yield tried
        try:
            point = proposals.send(tried.cost)
        except StopIteration:
            return


def read(path: Path) -> list[Tried]:
    """The trials in a file up to the first line that is none; a torn last line is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            found.append(Tried(**json.loads(line)))
        except (ValueError, TypeError):
            break
    return found


def _line(tried: Tried) -> str:
    """Python writes the shortest digits that are read as the same number, NaN and infinity too."""
    return json.dumps(asdict(tried), ensure_ascii=False)


def _same(kept: list[float], point: list[float]) -> bool:
    return [float(value).hex() for value in kept] == [float(value).hex() for value in point]
