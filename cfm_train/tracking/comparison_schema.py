"""The part of a record that puts bricks and configurations side by side; strict, as the record."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # pydantic wants this one below Python 3.12

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@with_config(_STRICT)
class Value(TypedDict):
    """A number with its 95 % interval over ``n`` examples (or seeds, or probe tokens)."""

    value: float
    low: float
    high: float
    n: int


@with_config(_STRICT)
class Part(TypedDict):
    """A brick of the library that a row is made of, with what its training read."""

    name: str
    version: str
    operation: str
    path: str | None
    data: dict[str, str]


@with_config(_STRICT)
class Row(TypedDict):
    """One row of the matrix: what it is, what it takes, and whether it may win.

    ``expression`` is the configuration with all versions and parameters, ``short`` the same as a
    person would write it. ``brick`` is the artifact where the row is one of the library.
    ``seconds`` is the training loop's (``training``), the whole run's that made the brick (``run``)
    or what assembling took here (``assembly``). ``bytes`` are those of its tensors as loaded, heads
    included. ``mean`` and ``normalised`` are averages over ``Comparison.tasks``.
    """

    label: str
    short: str
    expression: str
    role: Literal["brick", "merged", "floor", "ceiling"]
    brick: Part | None
    parts: list[Part]
    competes: bool
    chosen_on: str | None
    parameters: int | None
    bytes: int | None
    seconds: float | None
    seconds_of: Literal["training", "run", "assembly"] | None
    mean: Value | None
    normalised: Value | None


@with_config(_STRICT)
class Group(TypedDict):
    """Rows that differ by the seed alone; their mean competes in their place."""

    label: str
    members: list[str]
    mean: Value | None
    normalised: Value | None


@with_config(_STRICT)
class Winner(TypedDict):
    """The best row, and by how much it is better than the next."""

    label: str
    runner_up: str
    by: Literal["mean", "normalised"]
    lower_is_better: bool
    figure: Value
    margin: Value
    clear: bool
    tasks: dict[str, Value]
    method: str


@with_config(_STRICT)
class Point(TypedDict):
    """A configuration on a curve: ``mean`` on test rows, and ``validation``, what chooses."""

    x: float
    row: str
    mean: Value | None
    validation: float | None
    chosen: bool


@with_config(_STRICT)
class Curve(TypedDict):
    """Configurations along which one number changes and nothing else.

    ``tasks`` are those that their bricks were trained on, which ``mean`` and ``validation`` are of.
    ``validation`` is better when higher: losses and errors are negative there.
    """

    parameter: Literal["scale", "density", "weights"]
    name: str
    family: str
    tasks: list[str]
    points: list[Point]


@with_config(_STRICT)
class Pair(TypedDict):
    """How alike two updates are; see `evaluation.similarity`."""

    a: str
    b: str
    of: Literal["updates", "parameters"] | None
    reason: str | None
    cosine: float | None
    sign_conflict: float | None
    weighted_conflict: float | None


@with_config(_STRICT)
class Similarity(TypedDict):
    """All pairs of bricks."""

    labels: list[str]
    pairs: list[Pair]


@with_config(_STRICT)
class OrderOnTask(TypedDict):
    """A stitch and its opposite order on one task; the ``difference`` is paired.

    Above 0: as given is better.
    """

    task: str
    metric: str
    given: Value
    reverse: Value
    difference: Value


@with_config(_STRICT)
class Order(TypedDict):
    """What the opposite order of a stitch changes; ``effect`` as in `stitching.promises`."""

    row: str
    reverse: str
    effect: Value
    tasks: list[OrderOnTask]


@with_config(_STRICT)
class Forgetting(TypedDict):
    """A row on a task that none of its bricks was trained on, against the bare backbone.

    Both answer with the same head: one trained on the bare backbone, or the language model's own.
    ``change`` is paired; below 0: the row is worse than the backbone was.
    """

    row: str
    task: str
    metric: str
    bare: Value
    with_brick: Value
    change: Value


@with_config(_STRICT)
class Node(TypedDict):
    """Something that a row was made from, or a row: a brick, a configuration, a backbone."""

    id: str
    name: str
    version: str
    kind: Literal["brick", "configuration"]
    operation: str
    path: str | None
    data: dict[str, str]


@with_config(_STRICT)
class Edge(TypedDict):
    """What was made from what, with the weight where there is one."""

    a: str
    b: str
    weight: float | None


@with_config(_STRICT)
class Lineage(TypedDict):
    """The graph of everything that the rows were made from."""

    nodes: list[Node]
    edges: list[Edge]


@with_config(_STRICT)
class Reused(TypedDict):
    """How many evaluations were taken from earlier records, and how many were made."""

    found: int
    made: int


@with_config(_STRICT)
class Comparison(TypedDict):
    """Bricks and configurations side by side.

    ``tasks`` are those that averages are over, ``test_sets`` how many sets of test rows they have
    (tasks that share their rows count as one), ``individuals`` each task's own brick, ``unrelated``
    the tasks that no brick here was trained on.
    """

    tasks: list[str]
    test_sets: int
    individuals: dict[str, str]
    unrelated: list[str]
    rows: list[Row]
    groups: list[Group]
    winner: Winner | None
    curves: list[Curve]
    similarity: Similarity | None
    orders: list[Order]
    forgetting: list[Forgetting]
    lineage: Lineage
    reused: Reused
