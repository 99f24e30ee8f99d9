"""What a brick costs on text that has nothing to do with it: perplexity with it over without.

ratio = exp( (Σ nats with the brick − Σ nats of the bare backbone) / tokens )
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cfm_train.backbone.load import Backbone
from cfm_train.backbone.plugs import Pluggable
from cfm_train.data.encode import Encoded
from cfm_train.data.tasks import TaskSpec
from cfm_train.evaluation.evaluator import predict
from cfm_train.evaluation.intervals import Score, intervals

SPEC = TaskSpec("unrelated", "causal", None, "loss", False, ("text",))


def cost(
    backbone: Backbone,
    bricks: Sequence[Pluggable],
    rows: Encoded,
    *,
    bootstrap: int,
    seed: int,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Score]:
    """Perplexity of the bare backbone and of the plugged one, and their ratio.

    Args:
        backbone: a language model.
        bricks: what is plugged in.
        rows: unrelated text; rows (blocks) are what is resampled.
        bootstrap: number of resamples.
        seed: seed of the draws.
        progress: called with the number of rows after each batch, twice for each row.

    Returns:
        ``bare/perplexity``, ``brick/perplexity`` and ``perplexity_ratio``, paired.
    """
    nats = []
    for plugged in ([], bricks):
        with backbone.slots.plugged(plugged):
            answers = predict(backbone, None, SPEC, rows, progress=progress)
        nats.append(np.array([answers.losses[i][0] for i in range(len(rows))]))
        tokens = np.array([answers.losses[i][1] for i in range(len(rows))])
    bare, brick = nats
    return intervals(
        {
            "bare/perplexity": lambda w: np.exp((w @ bare) / (w @ tokens)),
            "brick/perplexity": lambda w: np.exp((w @ brick) / (w @ tokens)),
            "perplexity_ratio": lambda w: np.exp((w @ (brick - bare)) / (w @ tokens)),
        },
        np.ones(len(rows), np.int64),
        bootstrap=bootstrap,
        seed=seed,
    )
