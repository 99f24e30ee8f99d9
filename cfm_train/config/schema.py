"""One typed schema for each operation: which keys a run has and what may stand in them.

Strict: an unknown key, a missing one or a value of another type is an error. No defaults here, they
stand in ``conf/`` alone. A key whose type is a plain ``str`` is free text (see `quoting`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from cfm_train.config.merging import Merging, ModelMerging
from cfm_train.config.searching import Searching
from cfm_train.config.section import Section
from cfm_train.config.types import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    Rate,
    Share,
    Text,
)

NAME = r"^[^/\\\x00-\x1f]+$"
SHA256 = "^[0-9a-f]{64}$"

#: What a pattern means, for the person whose text does not fit it.
PATTERNS = {NAME: "a name without slashes", SHA256: "64 hexadecimal digits"}


class Tracking(Section):
    """Where a run is logged."""

    mode: Literal["auto", "offline", "online", "disabled"]
    project: str
    group: str | None
    tags: list[str]


class Backbone(Section):
    """A frozen model: an installed package, a local folder or a Hub id."""

    id: str | None
    package: str | None
    path: str | None
    revision: str | None
    sha256: Annotated[str, Field(pattern=SHA256)] | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]


class Brick(Section):
    """What every brick kind has; its own parameters are added from its class (see `signature`)."""

    model_config = ConfigDict(extra="allow")

    kind: Literal["?"]  # replaced by the kinds that exist
    learning_rate: Rate


class Splits(Section):
    """What the splits of a Hub data set are called."""

    train: str | None
    validation: str | None
    test: str | None


class Data(Section):
    """One task: where its rows are, which columns they have, how they are read.

    ``limit`` cuts the training rows alone: figures stay those of the whole validation and test
    splits.
    """

    name: str
    task: Literal[
        "classification", "multilabel", "regression", "token", "causal", "instruct", "seq2seq"
    ]
    train: str | None
    validation: str | None
    test: str | None
    root: str | None
    hub: str | None
    subset: str | None
    revision: str | None
    hub_splits: Splits
    hub_columns: dict[str, str | list[str]] | None
    hub_labels: list[str] | None
    text: str | list[str] | None
    label: str | list[str] | None
    target: str | None
    system: str | None
    messages: str | None
    labels: list[str] | list[int] | None
    metric: str | None
    max_length: Positive
    target_max_length: Positive
    pack: bool
    unit: Literal["line", "paragraph", "file"]
    validation_fraction: Share
    test_fraction: Share
    bad_rows: Literal["stop", "skip"]
    limit: Positive | None
    tasks: list[str] | None
    mixture: NonNegative


class Trainer(Section):
    """How long and how fast a brick is trained."""

    learning_rate: Rate
    epochs: Positive
    max_steps: Positive | None
    tokens_per_batch: Positive
    rows_per_batch: Positive
    accumulate: Positive
    warmup: Fraction
    schedule: Literal["linear", "cosine", "constant"]
    weight_decay: NonNegative
    clip: NonNegative
    divergence: Rate
    precision: Literal["auto", "float32", "bfloat16"]
    validate_every: Positive | None
    patience: Positive | None
    checkpoint_every: Positive | None
    find_learning_rate: bool
    deterministic: bool
    threads: Positive | None
    samples: Count


class Evaluation(Section):
    """How a brick is judged."""

    bootstrap: Positive
    head_only: bool


class EvaluationData(Section):
    """What the tasks of an evaluation share; the rest of each stands in its own YAML."""

    root: str | None
    limit: Positive | None


class PredictionData(Section):
    """The rows to predict."""

    input: str
    task: str | None
    text: str | list[str] | None


class Run(Section):
    """What every run has."""

    operation: str
    recipe: str
    name: Annotated[str, Field(pattern=NAME)]
    seed: Count
    library: Annotated[str, Field(min_length=1)]
    outputs: Annotated[str, Field(min_length=1)]
    dry_run: bool
    tracking: Tracking


class Train(Run):
    """Train a brick on a task."""

    backbone: Backbone
    brick: Brick
    data: Data
    trainer: Trainer
    evaluation: Evaluation


class Evaluate(Run):
    """Score bricks on tasks."""

    backbone: Backbone | None
    bricks: list[str]
    tasks: list[str]
    data: EvaluationData
    evaluation: Evaluation


class Predict(Run):
    """Answer the rows of a file with a brick."""

    backbone: Backbone | None
    bricks: list[str]
    data: PredictionData
    out: str


class Merge(Run):
    """Make one brick from several."""

    backbone: Backbone | None
    bricks: list[str]
    weights: list[float | list[float]] | None
    merge: Merging
    search: Searching
    tasks: list[str]
    data: EvaluationData
    evaluation: Evaluation


class MergeModels(Run):
    """Make a backbone from whole models of one shape."""

    models: list[str]
    base: str | None
    weights: list[float | list[float]] | None
    merge: ModelMerging
    shard_bytes: Positive
    threads: Positive | None
    out: str


class StitchLayers(Run):
    """Make a backbone from layers of others, taken as they are."""

    slices: list[str]
    embed: Literal["first", "last"]
    head: Literal["first", "last"]
    untie: bool
    shard_bytes: Positive
    out: str


class Calibration(Section):
    """What a bridge between two models is fitted on before any training."""

    tokens: Positive
    cka_tokens: Positive
    ridge: list[NonNegative]


class StitchBridge(Run):
    """Put bottom layers of one model under top layers of another, through a linear bridge."""

    bottom: str
    top: str
    at: Literal["auto"] | list[Count]
    depth: list[Positive] | None
    train: bool
    opposite: bool
    calibration: Calibration
    data: Data
    trainer: Trainer
    evaluation: Evaluation


class Analyze(Run):
    """Gather statistics of bricks on their own tasks."""

    backbone: Backbone | None
    bricks: list[str]
    statistic: Literal["gram", "fisher"]
    rows: Positive
    data: EvaluationData


class Stitch(Run):
    """Make one brick of several that act one after the other or side by side."""

    backbone: Backbone | None
    bricks: list[str]
    mode: str
    fold: bool
    tasks: list[str]
    data: EvaluationData
    evaluation: Evaluation


class Compare(Evaluate):
    """Score bricks on tasks, and draw them with the runs that made them."""

    refit: bool
    reuse: bool


class Sequence(Run):
    """Several runs one after another, each with a record of its own."""

    steps: list[list[str]]


OPERATIONS: dict[str, type[Run]] = {
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
    "merge": Merge,
    "merge_models": MergeModels,
    "analyze": Analyze,
    "stitch_layers": StitchLayers,
    "stitch_bridge": StitchBridge,
    "stitch": Stitch,
    "compare": Compare,
    "sequence": Sequence,
}

__all__ = ["OPERATIONS", "Brick", "Run", "Section", "Text"]
