"""One typed schema for each operation: which keys a run has and what may stand in them.

Strict: an unknown key, a missing one or a value of another type is an error. No defaults here, they
stand in ``conf/`` alone. What runs are made of stands in `sections`. A key whose type is a plain
``str`` is free text (see `quoting`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from cfm_train.config.merging import Merging, ModelMerging
from cfm_train.config.searching import Searching
from cfm_train.config.section import Section
from cfm_train.config.sections import (
    SHA256,
    Architecture,
    AskedItems,
    Asking,
    Backbone,
    Brick,
    Calibration,
    ClassItems,
    Connector,
    Corpora,
    Data,
    Documents,
    Encoder,
    Evaluation,
    EvaluationData,
    FactEvaluation,
    FactGate,
    FactsData,
    FeatureCache,
    Intervals,
    Items,
    MoreItems,
    Objective,
    PredictionData,
    Teaching,
    Tokenizer,
    Tracking,
    Trainer,
)
from cfm_train.config.types import Count, Positive, Text

NAME = r"^[^/\\\x00-\x1f]+$"

#: What a pattern means, for the person whose text does not fit it.
PATTERNS = {NAME: "a name without slashes", SHA256: "64 hexadecimal digits"}


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


class Study(Run):
    """Teach a brick what documents say, and ask about them."""

    backbone: Backbone
    brick: Brick
    objective: Objective | None
    data: Documents
    distractors: list[str]
    trainer: Trainer
    evaluation: Asking


class Pretrain(Run):
    """Make a backbone from text alone."""

    architecture: Architecture
    tokenizer: Tokenizer
    data: Corpora
    trainer: Trainer
    snapshots: list[Count]
    dtype: Literal["float32", "bfloat16", "float16"]
    evaluation: Intervals
    out: str


class Align(Run):
    """Train what lets a language model read a frozen encoder's features."""

    backbone: Backbone
    encoder: Encoder
    connector: Connector
    tags: bool
    data: Items
    cache: FeatureCache
    trainer: Trainer
    evaluation: Intervals


class Classify(Run):
    """Put items into classes by how likely the language model finds each one's name."""

    backbone: Backbone | None
    bricks: list[str]
    encoder: dict[str, Any] | None
    data: ClassItems
    score: Literal["sum", "mean"]
    cache: FeatureCache
    evaluation: Intervals


class Caption(Run):
    """Let a language model say what it sees or hears, scored against what people said."""

    backbone: Backbone | None
    bricks: list[str]
    encoder: dict[str, Any] | None
    data: AskedItems
    max_new_tokens: Positive
    cache: FeatureCache
    evaluation: Intervals


class Instruct(Run):
    """Train a brick beside an aligned modality brick."""

    backbone: Backbone | None
    brick: Brick
    bricks: list[str]
    encoder: dict[str, Any] | None
    data: MoreItems
    cache: FeatureCache
    trainer: Trainer
    evaluation: Intervals


class Generate(Run):
    """Let a language model with bricks answer a prompt."""

    backbone: Backbone | None
    bricks: list[str]
    encoder: dict[str, Any] | None
    prompt: Text
    image: str | None
    audio: str | None
    features: str | None
    series: str | None
    table: str | None
    item: str | None
    max_new_tokens: Positive


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
    heads: Literal["parents", "refit"]
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


class Teach(Run):
    """Teach a brick facts, each with parameters of its own."""

    backbone: Backbone
    sentence_encoder: Backbone
    brick: Brick
    data: FactsData
    gate: FactGate
    teaching: Teaching
    evaluation: FactEvaluation


class Forget(Run):
    """Make a brick of facts without some of them."""

    backbone: Backbone | None
    bricks: list[str]
    facts: list[str]


class Remember(Run):
    """Make a brick of facts with more of them, computed and not taught."""

    backbone: Backbone | None
    bricks: list[str]
    data: FactsData
    evaluation: FactEvaluation


class Sequence(Run):
    """Several runs one after another, each with a record of its own."""

    steps: list[list[str]]


OPERATIONS: dict[str, type[Run]] = {
    "train": Train,
    "study": Study,
    "pretrain": Pretrain,
    "align": Align,
    "instruct": Instruct,
    "classify": Classify,
    "caption": Caption,
    "generate": Generate,
    "evaluate": Evaluate,
    "predict": Predict,
    "merge": Merge,
    "merge_models": MergeModels,
    "analyze": Analyze,
    "stitch_layers": StitchLayers,
    "stitch_bridge": StitchBridge,
    "stitch": Stitch,
    "compare": Compare,
    "teach": Teach,
    "forget": Forget,
    "remember": Remember,
    "sequence": Sequence,
}
