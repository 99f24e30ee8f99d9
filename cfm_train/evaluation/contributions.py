"""What each example adds to its task's metrics: a few numbers a row, enough for every one of them.

    classification   (right class, predicted class)
    multilabel       predicted bits, then right bits
    regression       (predicted, right)
    token            (tokens right, tokens, entities found, entities on both sides)
    causal, instruct (nats, tokens)
    seq2seq          (exact match, ROUGE-L, token F1)

They are what is kept of an evaluation: any metric, any interval and any paired comparison on the
same examples comes from them, without asking the model again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cfm_train.data.tasks import IGNORED, is_bio
from cfm_train.evaluation.spans import entity_counts
from cfm_train.evaluation.text import exact_match, rouge_l, token_f1


def contributions(
    task_type: str, predictions: Any, references: Any, *, labels: Sequence[str] | None = None
) -> np.ndarray:
    """What each example adds.

    Args:
        task_type: a key of ``METRICS``.
        predictions: what the model said, see `metrics.score`.
        references: what was right.
        labels: names of the classes; checks the ids, and BIO names let entities be counted.

    Returns:
        float64 [examples, numbers], in the order of the rows. Rows without a scored token are left
        out: that depends on the references alone, so two systems' examples always match.

    Raises:
        ValueError: unknown task type; no examples; lengths that differ; a NaN; an id out of range.
    """
    if task_type not in _CONTRIBUTIONS:
        raise ValueError(f"no task type {task_type!r}; there are {', '.join(_CONTRIBUTIONS)}")
    if len(predictions) != len(references) or not len(references):
        raise ValueError(
            f"{task_type}: needs as many predictions as references, and one at least; "
            f"got {len(predictions)} and {len(references)}"
        )
    return _CONTRIBUTIONS[task_type](predictions, references, labels)


def _classification(predictions: Any, references: Any, labels: Sequence[str] | None) -> np.ndarray:
    predictions, references = np.asarray(predictions), np.asarray(references)
    if predictions.ndim == 2:
        predictions = _finite(predictions).argmax(-1)
    pairs = np.stack([_ids(references, labels), _ids(predictions, labels)], -1)
    return pairs.astype(np.float64)


def _multilabel(predictions: Any, references: Any, labels: Sequence[str] | None) -> np.ndarray:
    predictions, references = np.asarray(predictions), np.asarray(references)
    if predictions.shape != references.shape or references.ndim != 2:
        raise ValueError(
            "multilabel: needs [rows, labels] on both sides, "
            f"got {predictions.shape} and {references.shape}"
        )
    if labels is not None and references.shape[1] != len(labels):
        raise ValueError(f"multilabel: {references.shape[1]} columns for {len(labels)} labels")
    both = np.concatenate([predictions, references], -1).astype(np.float64)
    if not np.isin(both, (0.0, 1.0)).all():
        raise ValueError(
            "multilabel: predictions and references are 0 or 1; apply the threshold first"
        )
    return both


def _regression(predictions: Any, references: Any, labels: Sequence[str] | None) -> np.ndarray:
    return np.stack([_finite(predictions).ravel(), _finite(references).ravel()], -1)


def _token(predictions: Any, references: Any, labels: Sequence[str] | None) -> np.ndarray:
    bio = labels is not None and is_bio(labels)
    rows = []
    for at, (predicted, wanted) in enumerate(zip(predictions, references, strict=True)):
        predicted, wanted = np.asarray(predicted), np.asarray(wanted)
        if predicted.shape != wanted.shape:
            raise ValueError(
                f"token: row {at} has {predicted.size} predictions for {wanted.size} tokens"
            )
        predicted, wanted = predicted[wanted != IGNORED], wanted[wanted != IGNORED]
        if wanted.size:
            predicted, wanted = _ids(predicted, labels), _ids(wanted, labels)
            entities = entity_counts(predicted, wanted, labels) if bio and labels else (0, 0)
            rows.append(((predicted == wanted).sum(), wanted.size, *entities))
    if not rows:
        raise ValueError("token: no row has a scored token")
    return np.array(rows, dtype=np.float64)


def _language(predictions: Any, references: Any, labels: Sequence[str] | None) -> np.ndarray:
    pairs = np.stack([_finite(predictions).ravel(), _finite(references).ravel()], -1)
    pairs = pairs[pairs[:, 1] > 0]
    if not len(pairs):
        raise ValueError("causal: no row has a predicted token")
    return pairs


def _seq2seq(predictions: Any, references: Any, labels: Sequence[str] | None) -> np.ndarray:
    rows = [
        (exact_match(said, right), rouge_l(said, right), token_f1(said, right))
        for said, right in zip(predictions, references, strict=True)
    ]
    return np.array(rows, dtype=np.float64)


_CONTRIBUTIONS: dict[str, Callable[[Any, Any, Sequence[str] | None], np.ndarray]] = {
    "classification": _classification,
    "multilabel": _multilabel,
    "regression": _regression,
    "token": _token,
    "causal": _language,
    "instruct": _language,
    "seq2seq": _seq2seq,
}


def _finite(values: Any) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("predictions or references hold a NaN or an infinity")
    return array


def _ids(values: np.ndarray, labels: Sequence[str] | None) -> np.ndarray:
    """Class ids as int64, checked against the labels."""
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(
            f"class ids are integers in one dimension, got {values.dtype} {values.shape}"
        )
    highest = len(labels) if labels is not None else np.iinfo(np.int64).max
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < highest:
        valid = f"0 to {highest - 1}" if labels is not None else "0 or more"
        raise ValueError(f"class ids go from {values.min()} to {values.max()}; valid are {valid}")
    return values.astype(np.int64)
