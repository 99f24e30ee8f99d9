"""What a task is: its kind of answer, its labels, and the figure that it is judged by.

Nothing here reads a file. ``TaskSpec`` is what the other rooms (heads, objectives, metrics, cards)
need to know of a task, and it is all they need to know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cfm_train.errors import UserError, nearest

#: The metrics of each task type, the primary one first; a data YAML may choose another of them.
METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1", "mcc"),
    "multilabel": ("micro_f1", "macro_f1", "exact"),
    "regression": ("pearson", "spearman", "rmse"),
    "token": ("entity_f1", "token_accuracy"),  # entity_f1 only where the labels are BIO tags
    "causal": ("loss", "perplexity"),
    "instruct": ("loss", "perplexity"),
    "seq2seq": ("rouge_l", "exact_match", "token_f1"),
}

#: All other metrics are better when they are higher.
LOWER_IS_BETTER = frozenset(
    {"loss", "perplexity", "rmse", "bits_per_byte", "perplexity_ratio"}
    | {"bytes_per_fact", "gate_bytes_per_fact", "shared_bytes", "seconds_per_fact"}
)

#: Task types whose answer is one of (or some of) a list of labels.
LABELLED = frozenset({"classification", "multilabel", "token"})

#: Task types that continue text, and so need the language model's own head.
GENERATIVE = frozenset({"causal", "instruct", "seq2seq"})

#: Task types that a head of the brick's own answers.
HEADED = frozenset(METRICS) - GENERATIVE

#: Label of a token that counts for nothing, as in PyTorch's cross entropy.
IGNORED = -100


@dataclass(frozen=True)
class TaskSpec:
    """A task as every other room sees it.

    Attributes:
        name: the task's own name, also the name of its head.
        type: a key of ``METRICS``.
        labels: label names in the order of the head's outputs; None where answers are not labels.
        metric: the figure that chooses the best checkpoint, without its split (``accuracy``).
        maximize: whether more of it is better.
        columns: columns of the source that make up the input, in order.
    """

    name: str
    type: str
    labels: tuple[str, ...] | None
    metric: str
    maximize: bool
    columns: tuple[str, ...]

    @property
    def size(self) -> int | None:
        """Outputs of the head: one per label, one for regression, None for generated text."""
        if self.labels is not None:
            return len(self.labels)
        return 1 if self.type == "regression" else None

    @property
    def pair(self) -> bool:
        """Whether the input is two texts that the tokenizer joins."""
        return len(self.columns) == 2 and self.type in (
            "classification",
            "multilabel",
            "regression",
        )

    def to_json(self) -> dict[str, Any]:
        """The part that a card keeps of the head: type, labels, number of outputs."""
        return {
            "task": self.type,
            "labels": None if self.labels is None else list(self.labels),
            "size": self.size,
        }


def as_columns(value: Any) -> tuple[str, ...]:
    """A column mapping as written (nothing, one name, several names) as a tuple of names."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def make_spec(section: Mapping[str, Any], labels: tuple[str, ...] | None) -> TaskSpec:
    """The spec of one data section.

    Args:
        section: a data section (see ``conf/data/custom.yaml`` for every key).
        labels: the labels, from the section or found in the training rows.

    Raises:
        UserError: there is no such task type, or it has no such metric.
    """
    kind = section["task"]
    if kind not in METRICS:
        raise UserError(f"data.task: there is no task type '{kind}'.{nearest(str(kind), METRICS)}")
    choices = METRICS[kind]
    if kind == "token" and labels is not None and not is_bio(labels):
        choices = ("token_accuracy",)
    metric = section["metric"] or choices[0]
    if metric not in choices:
        raise UserError(
            f"data.metric: '{metric}' is no metric of a {kind} task"
            f"{' without BIO tags' if len(choices) == 1 else ''}.{nearest(metric, choices)}"
        )
    return TaskSpec(
        name=section["name"],
        type=kind,
        labels=labels,
        metric=metric,
        maximize=metric not in LOWER_IS_BETTER,
        columns=as_columns(section["messages"]) or as_columns(section["text"]),
    )


def is_bio(labels: Sequence[str]) -> bool:
    """Whether label names are BIO tags: ``O``, ``B-…``, ``I-…``, with at least one ``B-…``."""
    return any(name.startswith("B-") for name in labels) and all(
        name == "O" or name[:2] in ("B-", "I-") for name in labels
    )
