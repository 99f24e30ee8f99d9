"""The schema of a record: every key, its type and what it means. Strict: no key more, none less."""

from __future__ import annotations

from typing import Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # pydantic wants this one below Python 3.12

from cfm_train.tracking.comparison_schema import Comparison

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@with_config(_STRICT)
class Figure(TypedDict):
    """A metric with its 95 % interval over ``n`` examples."""

    value: float
    low: float
    high: float
    n: int


@with_config(_STRICT)
class Cell(TypedDict):
    """One cell of the brick × task matrix; ``role`` says which kind of row it stands in.

    ``head`` is the row whose head answered (``head refitted``: one trained anew on the body; null:
    a language model's own), ``key`` names the examples that the figure was made from, ``source``
    the earlier run that they were taken from, ``note`` what has to be said beside the brick.
    """

    brick: str
    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    role: Literal["brick", "merged", "floor", "ceiling"]
    head: NotRequired[str | None]
    key: NotRequired[str]
    source: NotRequired[str]
    note: NotRequired[str]


@with_config(_STRICT)
class Check(TypedDict):
    """A promise that the run checked: the figure, what it had to stay within, whether it did."""

    value: float | bool | str | None
    tolerance: float | None
    passed: bool


@with_config(_STRICT)
class Parent(TypedDict):
    """A brick that another was made from, with its weight where the operation has one."""

    name: str
    version: str
    weight: NotRequired[float | None]


@with_config(_STRICT)
class Brick(TypedDict):
    """The artifact that the run wrote (``evaluate`` and ``predict``: the one that it read)."""

    name: str
    version: str
    path: str
    parents: list[Parent]


@with_config(_STRICT)
class Backbone(TypedDict):
    """The frozen model under the brick; ``unchanged`` is true when its checksum is what it was."""

    id: str
    fingerprint: str
    unchanged: bool


@with_config(_STRICT)
class Cost(TypedDict):
    """What the run took; a figure that an operation lacks is null (a merge trains nothing).

    ``seconds`` is wall time, ``train_seconds`` that of the training loop without validation; of a
    run that was taken up again, both count all of its sessions.
    """

    seconds: float
    train_seconds: float | None
    samples_per_second: float | None
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    trainable_parameters: int | None
    flop_share: float | None


@with_config(_STRICT)
class Leaks(TypedDict):
    """Rows of a task that stood in two splits and were dropped from one; the first few places."""

    total: int
    counts: dict[str, int]
    examples: list[str]


@with_config(_STRICT)
class Data(TypedDict):
    """What reading the data found: leaks by task, skipped rows, a fingerprint for every split."""

    leaks: dict[str, Leaks]
    skipped_rows: int
    fingerprints: dict[str, str]


@with_config(_STRICT)
class Sample(TypedDict):
    """One example as a person reads it; ``right`` is null where no answer is right or wrong."""

    input: str
    prediction: str
    reference: str
    right: NotRequired[bool | None]
    task: NotRequired[str]
    at: NotRequired[str]
    step: NotRequired[int]


@with_config(_STRICT)
class Wandb(TypedDict):
    """Where the run stands in W&B."""

    mode: Literal["offline", "online", "disabled"]
    id: str | None
    project: str | None
    group: str | None
    error: NotRequired[str | None]


@with_config(_STRICT)
class Examples(TypedDict):
    """Where the run keeps what each row added to its metrics, and under which keys."""

    file: str
    keys: list[str]


@with_config(_STRICT)
class Heatmap(TypedDict):
    """A table of numbers to be shown as colours, such as CKA between the layers of two models.

    ``values`` has one list for each of ``rows`` with one number for each of ``columns``; ``chosen``
    is the row and column of the cell that the run went on with, where there is one.
    """

    title: str
    rows: list[str]
    columns: list[str]
    values: list[list[float]]
    chosen: list[int] | None


@with_config(_STRICT)
class Arm(TypedDict):
    """What one way to answer questions came to: nats per answer token, shares of 1 else.

    ``name`` is ``bare``, ``text`` (the passage in the prompt), ``brick``, ``both`` or ``among
    others`` (the brick beside other cartridges); ``exact_match`` is of freely written answers.
    """

    name: str
    loss: Figure
    token_accuracy: Figure
    exact_match: NotRequired[Figure]


@with_config(_STRICT)
class Gain(TypedDict):
    """What one arm has over another, paired question by question; of a loss, less is better."""

    arm: str
    over: str
    loss: Figure
    token_accuracy: Figure
    exact_match: NotRequired[Figure]


@with_config(_STRICT)
class Unrelated(TypedDict):
    """Perplexity on text that has nothing to do with the brick: without it, with it, the ratio."""

    bare_perplexity: Figure
    brick_perplexity: Figure
    perplexity_ratio: Figure


@with_config(_STRICT)
class Arms(TypedDict):
    """A knowledge brick's answers beside those of its text in the prompt.

    ``questions`` is how many test questions, ``made`` who made them (``given`` by a person, or
    ``by rule``), ``cut`` how many of them have a passage that was too long for a context.
    """

    questions: int
    made: Literal["given", "by rule"]
    cut: int
    arms: list[Arm]
    gains: list[Gain]
    unrelated: Unrelated | None


@with_config(_STRICT)
class Trial(TypedDict):
    """A point that a search tried: a number for each axis, the mean score and that of each task."""

    point: dict[str, float]
    value: float
    scores: dict[str, float]
    penalty: float


@with_config(_STRICT)
class Search(TypedDict):
    """How a merge's weights were found.

    ``objective`` is what was compared (``metric``, ``loss``, ``relative loss``, ``entropy``),
    ``chosen_on`` the rows that it was compared on (never test rows, but for a method that
    adapts on their inputs: ``note`` says so), ``rows`` how many of each task; ``chosen``
    is the number of the best trial.
    """

    method: str
    objective: Literal["metric", "loss", "relative loss", "entropy"]
    chosen_on: Literal["validation", "test inputs"]
    note: str | None
    lower_is_better: bool
    rows: dict[str, int]
    axes: list[str]
    trials: list[Trial]
    chosen: int


@with_config(_STRICT)
class Record(TypedDict):
    """The whole record.

    ``config_hash`` is that of everything that decides the result, ``seedless_hash`` that of
    everything but the seed. ``refitted`` is a second matrix: every body with a head trained anew
    on it. ``search`` says how weights were found.
    ``folder`` is where the record was read from; it is never written.
    """

    operation: str
    recipe: str
    name: str
    status: Literal["done", "failed"]
    seed: int
    brick: Brick | None
    backbone: Backbone | None
    metrics: dict[str, Figure]
    checks: dict[str, Check]
    cost: Cost
    config_hash: str
    seedless_hash: NotRequired[str]
    versions: dict[str, str]
    inputs: dict[str, str]
    data: Data | None
    matrix: list[Cell]
    samples: list[Sample]
    wandb: Wandb | None
    curves: str | None
    examples: NotRequired[Examples]
    heatmaps: NotRequired[list[Heatmap]]
    refitted: NotRequired[list[Cell]]
    comparison: NotRequired[Comparison]
    search: NotRequired[Search]
    arms: NotRequired[Arms]
    error: NotRequired[str | None]
    folder: NotRequired[str]
