"""The sections that runs are made of: which keys each has and what may stand in them.

Strict, as all of `schema`. No defaults here, they stand in ``conf/`` alone. The sections of merges
and searches have files of their own (`merging`, `searching`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from cfm_train.config.section import Section
from cfm_train.config.types import Count, Fraction, NonNegative, Positive, Rate, Share, Text

SHA256 = "^[0-9a-f]{64}$"


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


class Encoder(Section):
    """A frozen model of another modality; its parameters are added from its class."""

    model_config = ConfigDict(extra="allow")

    kind: Literal["?"]


class Connector(Section):
    """What turns an encoder's features into tokens; its parameters are added from its class."""

    model_config = ConfigDict(extra="allow")

    kind: Literal["?"]
    learning_rate: Rate


class Items(Section):
    """Items of a modality with what is said of them: rows, or a folder or zip with a folder for
    each class.

    ``prompt`` stands before a row's text where the row holds no messages; ``<item>`` in it is where
    the item goes. ``root`` is the folder or zip that the rows' paths are read from.
    """

    items: str
    validation: str | None
    test: str | None
    root: str | None
    text: str
    prompt: Text
    max_length: Positive
    validation_fraction: Share
    test_fraction: Share
    limit: Positive | None


class MoreItems(Items):
    """Items for a brick that was trained before, asked as it was where ``prompt`` is null."""

    prompt: Text | None  # type: ignore[assignment]


class AskedItems(Section):
    """Items that finished bricks are asked about, with what is right."""

    items: str
    root: str | None
    text: str
    prompt: Text | None
    max_length: Positive
    limit: Positive | None


class ClassItems(AskedItems):
    """Items to put into classes, each with its right one."""

    classes: list[str] | None


class FeatureCache(Section):
    """Where an encoder's features are kept on disk, and how much they may take there."""

    limit_gb: Rate
    dtype: Literal["float16", "float32"]


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

    optimizer: Literal["adamw", "muon"]
    learning_rate: Rate
    head_learning_rate: Rate
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


class Documents(Section):
    """Documents to be learnt, and what is asked about them.

    ``most_questions`` and both fractions choose by content hash.
    """

    documents: str
    text: str
    unit: Literal["line", "paragraph", "file"]
    passage: Positive
    questions: str | None
    most_questions: Positive | None
    validation_fraction: Share
    test_fraction: Share
    unrelated: str | None
    unrelated_unit: Literal["line", "paragraph", "file"]
    unrelated_fraction: Share
    max_length: Annotated[int, Field(ge=8)]
    context: Annotated[int, Field(ge=8)]


class Objective(Section):
    """What is minimised on documents; its own parameters are added from its class."""

    model_config = ConfigDict(extra="allow")

    kind: Literal["?"]  # replaced by the kinds that exist


class Asking(Section):
    """How a brick of documents is judged by its answers."""

    bootstrap: Positive
    generate: bool


class Calibration(Section):
    """What a bridge between two models is fitted on before any training."""

    tokens: Positive
    cka_tokens: Positive
    ridge: list[NonNegative]


class Corpora(Section):
    """Text domains to pretrain on, and some to leave out."""

    root: str
    domains: list[str] | None
    leave_out: list[str]
    unit: Literal["line", "paragraph", "file"]
    max_length: Positive


class Architecture(Section):
    """A Llama-type model, in the words of transformers' ``LlamaConfig``."""

    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    max_position_embeddings: Positive
    rope_theta: Rate
    tie_word_embeddings: bool


class Tokenizer(Section):
    """A byte-level BPE to train: the 256 bytes and two special tokens are part of it."""

    vocab_size: Annotated[int, Field(ge=258)]


class Intervals(Section):
    """How figures get their intervals."""

    bootstrap: Positive


class FactsData(Section):
    """Facts to teach, and text that has nothing to do with them."""

    facts: str | None
    documents: str | None
    text: str
    unrelated: str | None
    limit: Positive | None


class FactGate(Section):
    """What lets a fact act on a prompt."""

    kind: Literal["encoder", "none"]
    false_fires: Fraction
    threshold: Annotated[float, Field(ge=-1, le=1)] | None


class Teaching(Section):
    """How facts are taught."""

    steps: Positive
    prompts_per_step: Positive
    facts_per_group: Positive
    facts_per_batch: Positive
    contexts: Count
    context_tokens: Positive
    context_share: Fraction
    clip: NonNegative
    enough: NonNegative
    patience: Positive
    threads: Positive | None


class FactEvaluation(Section):
    """How a brick of facts is judged."""

    bootstrap: Positive
    unrelated_windows: Positive
    window_tokens: Positive
