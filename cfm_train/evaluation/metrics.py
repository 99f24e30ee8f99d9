"""The metrics of every task type, each with a 95 % bootstrap interval over examples.

A metric is a function of weighted examples (``intervals.py``): here each example is boiled down to
what it contributes (a cell of the confusion matrix, counts of hits, a pair of numbers), equal ones
are counted, and the metric is written once, for the whole test set and for all resamples.

Cases that a formula leaves open are defined, never NaN:

- a class that occurs neither in the references nor in the predictions does not enter ``macro_f1``;
- ``mcc``, ``pearson`` and ``spearman`` are 0 where either side is constant;
- ``micro_f1``, ``macro_f1`` and ``entity_f1`` are 0 where nothing was there nor predicted;
- no example at all, a NaN, or a class outside the labels is a ``ValueError``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cfm_train.data.tasks import is_bio
from cfm_train.evaluation.contributions import contributions
from cfm_train.evaluation.intervals import Score, Statistic, intervals


def score(
    task_type: str,
    predictions: Any,
    references: Any,
    *,
    labels: Sequence[str] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """Scores predictions against references.

    Args:
        task_type: a key of ``METRICS``; it decides what the arrays hold:

            - ``classification``: class ids int [n] (predictions may be logits, float [n, classes]);
            - ``multilabel``: 0/1 [n, labels], any dtype;
            - ``regression``: float [n];
            - ``token``: one sequence of class ids per row (or int [n, length]); tokens whose
              reference is -100 are not scored, rows without a scored token are no examples;
            - ``causal``, ``instruct``: predictions are each row's summed negative log-likelihood in
              nats, float [n]; references are its numbers of predicted tokens, int [n];
            - ``seq2seq``: one string per row.
        predictions: what the model said.
        references: what was right.
        labels: names of the classes; checks the ids, and BIO names give ``entity_f1``.
        bootstrap: number of resamples; 0 gives intervals without width.
        seed: seed of the resamples.

    Returns:
        The task type's metrics by name.

    Raises:
        ValueError: unknown task type; no examples; lengths that differ; a NaN; an id out of range.
    """
    rows = contributions(task_type, predictions, references, labels=labels)
    return score_rows(task_type, rows, labels=labels, bootstrap=bootstrap, seed=seed)


def score_rows(
    task_type: str,
    rows: np.ndarray,
    *,
    labels: Sequence[str] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """As `score`, from what each example adds.

    Args:
        task_type: a key of ``METRICS``.
        rows: what `contributions` gave, float64 [examples, …].
        labels: as in `score`.
        bootstrap: number of resamples.
        seed: seed of the resamples.
    """
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    return intervals(
        statistics(task_type, distinct, labels), counts, bootstrap=bootstrap, seed=seed
    )


def statistics(
    task_type: str, rows: np.ndarray, labels: Sequence[str] | None = None
) -> dict[str, Statistic]:
    """The metrics of a task type as functions of weighted examples.

    Args:
        task_type: a key of ``METRICS``.
        rows: what each example adds, float64 [examples, …]; equal ones may stand there as one.
        labels: BIO names give ``entity_f1``.

    Returns:
        Each metric as a function of weights [resamples, examples].
    """
    return _STATISTICS[task_type](rows, labels is not None and is_bio(labels))


def _classification(cells: np.ndarray, bio: bool) -> dict[str, Statistic]:
    """Accuracy, macro F1 and Matthews' correlation (Gorodkin, 2004) from confusion cells."""
    classes, column = np.unique(cells, return_inverse=True)  # those that occur: ids may be sparse
    column = column.reshape(cells.shape)
    is_reference, is_prediction = (np.eye(len(classes))[column[:, side]] for side in (0, 1))
    is_hit = is_reference * is_prediction  # [cells, classes]

    def mcc(weights: np.ndarray) -> np.ndarray:
        n = weights.sum(-1)
        t, p = weights @ is_reference, weights @ is_prediction  # [resamples, classes]
        covariance = n * (weights @ is_hit.sum(-1)) - (t * p).sum(-1)
        return _ratio(covariance, np.sqrt((n**2 - (t**2).sum(-1)) * (n**2 - (p**2).sum(-1))))

    return {
        "accuracy": lambda weights: weights @ is_hit.sum(-1) / weights.sum(-1),
        "macro_f1": lambda weights: _macro_f1(
            weights @ is_hit, weights @ (is_reference + is_prediction)
        ),
        "mcc": mcc,
    }


def _multilabel(rows: np.ndarray, bio: bool) -> dict[str, Statistic]:
    """Micro and macro F1 over labels, and the share of rows with exactly the right set."""
    predicted, wanted = np.split(rows, 2, axis=-1)  # [distinct, labels]
    hits, seen = predicted * wanted, predicted + wanted
    exact = (predicted == wanted).all(-1)
    return {
        "micro_f1": lambda weights: _ratio(2 * (weights @ hits.sum(-1)), weights @ seen.sum(-1)),
        "macro_f1": lambda weights: _macro_f1(weights @ hits, weights @ seen),
        "exact": lambda weights: weights @ exact / weights.sum(-1),
    }


def _regression(pairs: np.ndarray, bio: bool) -> dict[str, Statistic]:
    """Pearson's and Spearman's correlation and the root of the mean squared error."""
    x, y = pairs.T
    squared = (x - y) ** 2

    def pearson(weights: np.ndarray) -> np.ndarray:
        return _correlation(_standard(x)[None], _standard(y)[None], weights)

    def spearman(weights: np.ndarray) -> np.ndarray:
        return _correlation(_ranks(x, weights), _ranks(y, weights), weights)

    return {
        "pearson": pearson,
        "spearman": spearman,
        "rmse": lambda weights: np.sqrt(weights @ squared / weights.sum(-1)),
    }


def _token(rows: np.ndarray, bio: bool) -> dict[str, Statistic]:
    """Accuracy over tokens and, with BIO labels, F1 over whole entities; resampled by rows."""
    hits, tokens, found, seen = rows.T
    statistics: dict[str, Statistic] = {
        "token_accuracy": lambda weights: weights @ hits / (weights @ tokens)
    }
    if bio:
        statistics["entity_f1"] = lambda weights: _ratio(2 * (weights @ found), weights @ seen)
    return statistics


def _language(pairs: np.ndarray, bio: bool) -> dict[str, Statistic]:
    """Nats per token over the whole set, and the perplexity that is its exponential."""
    nats, tokens = pairs.T

    def loss(weights: np.ndarray) -> np.ndarray:
        return weights @ nats / (weights @ tokens)

    # A double holds e^700 with room to spare; only a broken model gets there.
    return {
        "loss": loss,
        "perplexity": lambda weights: np.exp(np.minimum(loss(weights), 700.0)),
    }


def _seq2seq(rows: np.ndarray, bio: bool) -> dict[str, Statistic]:
    """Means over rows of exact match, ROUGE-L and token F1."""

    def mean_of(column: np.ndarray) -> Statistic:
        return lambda weights: weights @ column / weights.sum(-1)

    names = ("exact_match", "rouge_l", "token_f1")
    return {name: mean_of(column) for name, column in zip(names, rows.T, strict=True)}


_STATISTICS: dict[str, Callable[[np.ndarray, bool], dict[str, Statistic]]] = {
    "classification": _classification,
    "multilabel": _multilabel,
    "regression": _regression,
    "token": _token,
    "causal": _language,
    "instruct": _language,
    "seq2seq": _seq2seq,
}


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """``top / bottom``, and 0 where ``bottom`` is 0."""
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)


def _macro_f1(hits: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Mean of ``2 hits / seen`` over the classes that occur; both [resamples, classes]."""
    return _ratio(_ratio(2 * hits, seen).sum(-1), (seen > 0).sum(-1).astype(np.float64))


def _standard(x: np.ndarray) -> np.ndarray:
    """Centred and scaled, so that sums of squares keep their digits; all zeros where constant."""
    return (x - x.mean()) / x.std() if x.min() < x.max() else np.zeros_like(x)


def _ranks(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mid-ranks within each resample, [resamples, distinct]; ties share their mean."""
    order = np.argsort(x, kind="stable")
    starts = np.flatnonzero(np.diff(x[order], prepend=-np.inf))
    tied = np.add.reduceat(weights[:, order], starts, axis=-1)  # [resamples, groups]
    middle = np.cumsum(tied, -1) - (tied - 1) / 2
    group = np.empty(len(x), dtype=np.int64)
    group[order] = np.cumsum(np.diff(x[order], prepend=-np.inf) != 0) - 1
    return middle[:, group]


def _correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted Pearson correlation per resample; 0 where a side is constant up to rounding."""
    n = weights.sum(-1, keepdims=True)
    mean_x, mean_y = ((weights * side).sum(-1, keepdims=True) / n for side in (x, y))
    x, y = x - mean_x, y - mean_y
    variance_x, variance_y = (weights * x**2).sum(-1), (weights * y**2).sum(-1)
    rounding = n[:, 0] * 1e-26
    varies = (variance_x > rounding * (1 + mean_x[:, 0] ** 2)) & (
        variance_y > rounding * (1 + mean_y[:, 0] ** 2)
    )
    bottom = np.where(varies, np.sqrt(variance_x * variance_y), 0.0)
    return np.clip(_ratio((weights * x * y).sum(-1), bottom), -1.0, 1.0)
