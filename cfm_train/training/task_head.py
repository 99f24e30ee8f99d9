"""A new head for a task, the same whichever brick it belongs to."""

from __future__ import annotations

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.heads import Head
from cfm_train.data.tasks import TaskSpec
from cfm_train.training.seeding import reseed


def new_head(backbone: Backbone, spec: TaskSpec, seed: int) -> Head:
    """An untrained head, pooled as suits the backbone: its values are a function of seed and task.

    Args:
        backbone: the backbone that it will read.
        spec: a task that a head answers.
        seed: the run's.
    """
    reseed(seed, "head", spec.name)
    labels = None if spec.labels is None else list(spec.labels)
    whole = "last" if backbone.family == "decoder" else "mean"  # what has seen the whole text
    pooling = "none" if spec.type == "token" else whole
    return Head(spec.type, labels, backbone.hidden_size, pooling).to(backbone.device)
