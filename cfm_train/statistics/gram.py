"""Gram matrices of the inputs of a brick's sites, what RegMean weighs updates with.

G = 1/T Σ_t x_t x_tᵀ        (Jin et al. 2022, arXiv 2212.09849)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.data.encode import TaskData
from cfm_train.statistics.observer import Observer, batches, real
from cfm_train.training.objectives import compute


@torch.no_grad()
def gather(
    backbone: Backbone,
    brick: Brick,
    task: TaskData,
    sites: Sequence[str],
    *,
    rows: int,
    seed: int,
    progress: Callable[[int], None],
) -> dict[str, Tensor]:
    """The Gram matrix of every site's input over the real tokens of some training rows.

    Args:
        backbone: the backbone, nothing plugged.
        brick: the brick, plugged for the pass.
        task: the task.
        sites: names of linear sites.
        rows: how many training rows are read.
        seed: decides which.
        progress: called with the number of rows of each batch.

    Returns:
        Site -> ``[in, in]`` float32, the mean over tokens; summed in float64.
    """
    sums: dict[str, Tensor] = {}
    tokens = 0
    observer = Observer(sites, gradients=False)
    with backbone.slots.plugged([brick, observer]):
        for batch in batches(task, rows, seed, backbone):
            compute(task.spec.type, backbone, brick.head_for(task.spec.name), batch)
            for site, x in observer.inputs.items():
                kept = x[real(x, batch, site)].float()
                product = (kept.T @ kept).double()
                sums[site] = sums.get(site, torch.zeros_like(product)) + product
            tokens += batch["tokens"]
            progress(len(batch["index"]))
    return {site: (total / tokens).float().cpu() for site, total in sums.items()}
