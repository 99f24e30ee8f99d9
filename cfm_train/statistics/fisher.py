"""The diagonal of the Fisher information of a site's weight, what Fisher merging weighs with.

    F = 1/R Σ_rows (∂ log p(y | x) / ∂W)²      (Matena and Raffel 2021, arXiv 2111.09832)

In classification ``y`` is drawn from the model's own prediction, row by row; in other tasks it is
the right answer (the empirical Fisher). The gradient of a row is that of its whole update, summed
over its tokens before it is squared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.data.encode import TaskData
from cfm_train.statistics.observer import Observer, batches
from cfm_train.training.objectives import compute


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
    """The Fisher diagonal of every site's weight, over some training rows.

    Args:
        backbone: the backbone, nothing plugged.
        brick: the brick, plugged for the pass.
        task: the task.
        sites: names of linear sites.
        rows: how many training rows are read.
        seed: decides which, and what is drawn.
        progress: called with the number of rows of each batch.

    Returns:
        Site -> ``[out, in]`` float32, the mean over rows; summed in float64.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    head = brick.head_for(task.spec.name)
    observer = Observer(sites, gradients=True)
    generator = torch.Generator().manual_seed(seed)
    with backbone.slots.plugged([brick, observer]), torch.enable_grad():
        for batch in batches(task, rows, seed, backbone):
            result = compute(task.spec.type, backbone, head, batch)
            if task.spec.type == "classification":
                assert head is not None and result.logits is not None
                chances = result.logits.detach().float().softmax(-1).cpu()
                drawn = torch.multinomial(chances, 1, generator=generator)[:, 0]
                loss = torch.nn.functional.cross_entropy(
                    result.logits.float(), drawn.to(result.logits.device), reduction="sum"
                )
            else:
                loss = result.loss
            places = list(observer.outputs.items())
            gradients = torch.autograd.grad(loss, [place for _, place in places])
            for (site, _), gradient in zip(places, gradients, strict=True):
                x = observer.inputs[site].float()
                of_row = torch.einsum("bto,bti->boi", gradient.float(), x)
                squared = of_row.square().sum(0).double()
                sums[site] = sums.get(site, torch.zeros_like(squared)) + squared
            count += len(batch["index"])
            progress(len(batch["index"]))
    return {site: (total / count).float().cpu() for site, total in sums.items()}
