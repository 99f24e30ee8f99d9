"""Figures of a stitched model: loss and perplexity, and the stitching penalty, all by document.

The stitching penalty (Bansal et al. 2021) is the stitched model's figure minus that of the model
whose top it has. Both are measured on the same documents, so its interval is paired: each bootstrap
resample draws documents, and takes the difference of the two figures on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cfm_train.backbone.load import Backbone
from cfm_train.data.encode import Encoded
from cfm_train.data.tasks import TaskSpec
from cfm_train.evaluation.evaluator import predict
from cfm_train.evaluation.intervals import Score, intervals
from cfm_train.evaluation.metrics import score


@dataclass(frozen=True)
class Measured:
    """Losses of one model on the documents of a split.

    Attributes:
        nats: per document its summed negative log-likelihood, float64.
        tokens: per document its predicted tokens, int64.
    """

    nats: np.ndarray
    tokens: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per token over all documents."""
        return float(self.nats.sum() / self.tokens.sum())

    def scores(self, bootstrap: int, seed: int) -> dict[str, Score]:
        """``loss`` and ``perplexity`` with 95 % intervals over documents."""
        return score("causal", self.nats, self.tokens, bootstrap=bootstrap, seed=seed)


def measure(backbone: Backbone, spec: TaskSpec, rows: Encoded) -> Measured:
    """Losses of whatever is plugged into a language model, document by document.

    Args:
        backbone: a language model, stitched or not.
        spec: the causal task.
        rows: its rows, not packed: pieces of one document each.
    """
    answers = predict(backbone, None, spec, rows)
    owners = rows.arrays["block_rows"]
    nats, tokens = np.zeros(len(rows.rows)), np.zeros(len(rows.rows), np.int64)
    for piece, value in answers.predictions.items():
        nats[owners[piece]] += value
        tokens[owners[piece]] += answers.references[piece]
    return Measured(nats[tokens > 0], tokens[tokens > 0])


def difference(one: Measured, other: Measured, bootstrap: int, seed: int) -> dict[str, Score]:
    """``one`` minus ``other`` in loss and perplexity, with paired 95 % intervals over documents.

    Raises:
        ValueError: they were measured on different documents.
    """
    if not np.array_equal(one.tokens, other.tokens):
        raise ValueError("paired figures need the same documents on both sides")
    tokens = one.tokens.astype(np.float64)

    def loss(weights: np.ndarray) -> Any:
        return weights @ (one.nats - other.nats) / (weights @ tokens)

    def perplexity(weights: np.ndarray) -> Any:
        a, b = (weights @ side.nats / (weights @ tokens) for side in (one, other))
        return np.exp(np.minimum(a, 700.0)) - np.exp(np.minimum(b, 700.0))

    counts = np.ones(len(tokens), np.int64)
    return intervals(
        {"loss": loss, "perplexity": perplexity}, counts, bootstrap=bootstrap, seed=seed
    )
