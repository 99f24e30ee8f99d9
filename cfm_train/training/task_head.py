"""A new head for a task, the same whichever brick it belongs to."""

from __future__ import annotations

import numpy as np
import torch

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.heads import Head
from cfm_train.data.encode import TaskData
from cfm_train.training.seeding import reseed


def new_head(backbone: Backbone, task: TaskData, seed: int) -> Head:
    """An untrained head, pooled as suits the backbone: its values are a function of seed and task.

    A regression head takes its unit from the training targets.

    Args:
        backbone: the backbone that it will read.
        task: a task that a head answers.
        seed: the run's.
    """
    spec = task.spec
    reseed(seed, "head", spec.name)
    labels = None if spec.labels is None else list(spec.labels)
    whole = "last" if backbone.family == "decoder" else "mean"  # what has seen the whole text
    pooling = "none" if spec.type == "token" else whole
    head = Head(spec.type, labels, backbone.hidden_size, pooling)
    if spec.type == "regression":
        head.take_unit(torch.from_numpy(np.array(task.train.arrays["labels"])))
    return head.to(backbone.device)
