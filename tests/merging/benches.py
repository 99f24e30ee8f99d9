"""Searches for weights as the tests make them: their section, a problem, a bench on rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.heads import Head
from cfm_train.config.compose import option
from cfm_train.config.merging import complete
from cfm_train.config.searching import Axis, axes_of, model_of
from cfm_train.data.sources import check_all
from cfm_train.data.splits import take
from cfm_train.merging.search.search import Problem, Proposals, make_search
from cfm_train.operations.bench import Bench
from cfm_train.operations.sought import Sought
from tests.backbones import tiny
from tests.merging.merges import ONE, TWO, make
from tests.tasks import section as data_section

LABELS = ["a", "b"]


def searching(kind: str, **given: Any) -> dict[str, Any]:
    """The section ``search`` of an option."""
    return model_of(kind).model_validate({**option("search", kind), **given}).model_dump()


def problem(*bounds: tuple[float, float], seed: int = 0) -> Problem:
    """A problem of some axes, from the middle of each."""
    axes = [Axis(f"x{at}", one, True) for at, one in enumerate(bounds)]
    return Problem(axes, [sum(one) / 2 for one in bounds], seed, lambda point: False)


def walk(
    proposals: Proposals, cost: Callable[[Sequence[float]], float]
) -> list[tuple[tuple[float, ...], float]]:
    """Every point proposed with its cost."""
    seen, point = [], next(proposals)
    while True:
        seen.append((tuple(point), cost(point)))
        try:
            point = proposals.send(seen[-1][1])
        except StopIteration:
            return seen


def with_heads(family: str = "bert") -> list[Brick]:
    """Two bricks of different ranks, scales and sites, each with a head of its own."""
    bricks = [make(family, ONE, 1), make(family, TWO, 2)]
    for brick, name in zip(bricks, LABELS, strict=True):
        torch.manual_seed(ord(name))
        head = Head("classification", ["no", "yes"], 32, "mean")
        torch.nn.init.normal_(head.linear.weight, std=0.5)
        brick.add_head(name, head)
        brick.requires_grad_(False)
    return bricks


def bench_of(
    folder: Path,
    kind: str,
    rule: str = "linear",
    *,
    given: Any = (0.5, 0.5),
    backbone: Backbone | None = None,
    flip: bool = False,
    merge: Any = (),
    **search: Any,
) -> Bench:
    """A bench for two tasks on the tiny encoder; ``flip`` turns the labels of all test rows."""
    chosen, mixed = searching(kind, **search), complete(rule, dict(merge))
    tasks = {}
    for number, name in enumerate(LABELS):
        rows = data_section("classification", folder, seed=number, rows=48, name=name)
        (tasks[name],) = check_all(rows)
        for row in tasks[name].rows["test"] if flip else ():
            row["label"] = 1 - row["label"]
    method = make_search(chosen)
    split = "test" if method.chosen_on == "test inputs" else "validation"
    decide = {name: take(task.rows[split], chosen["rows"]) for name, task in tasks.items()}
    return Bench(
        with_heads(),
        backbone or tiny("bert"),
        mixed,
        list(given) if mixed["equal"] else None,
        sought=Sought(chosen, axes_of(chosen, mixed, LABELS, None), tasks, decide),
        labels=LABELS,
        sources=LABELS,
        statistics=None,
        seed=0,
    )


def tried_by(bench: Bench) -> Iterator[Any]:
    """Every trial of a bench's search."""
    proposals = bench.search.propose(bench.problem)
    point = next(proposals)
    while True:
        tried = bench.try_out(point)
        yield tried
        try:
            point = proposals.send(tried.cost)
        except StopIteration:
            return
