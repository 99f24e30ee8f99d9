"""Learning-rate range test (Smith 2015, arXiv 1506.01186): raise the rate until the loss blows up.

The rate grows from `LOWEST` to `HIGHEST` over `STEPS` optimiser steps on a few of the run's own
batches, in turn; the suggestion is where the smoothed loss falls fastest. A batch's loss is taken
against what it was before the first step: batches differ by far more than one small step changes,
and the steepest fall would be that from a hard one to an easy one. Heads follow the same rate here;
in training they have their own. The brick is put back as it was, so that training starts afresh.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from cfm_train.tracking.atomic import replace_file
from cfm_train.training.dataset import StepDataset
from cfm_train.training.module import BrickModule, Diverged, rows_of
from cfm_train.training.objectives import Batch
from cfm_train.training.seeding import reseed

LOWEST, HIGHEST, STEPS = 1e-6, 1.0, 80
#: Batches that take turns.
BATCHES = 4
#: The mean reaches back over about two steps, a sixth of a decade.
SMOOTHING = 0.7
#: The test ends when the smoothed loss exceeds the first one this many times.
BLOWN_UP = 3.0
#: Points that a slope needs.
FEWEST = 3


def find_learning_rate(module: BrickModule, dataset: StepDataset, folder: Path) -> float:
    """Suggests a peak learning rate and leaves the curve in ``learning_rate.json`` of the run
    folder.

    Args:
        module: the module to train; its brick is restored afterwards.
        dataset: the run's training batches.
        folder: the run folder.

    Raises:
        Diverged: the loss is not finite before there is a curve to read.
    """
    curve_file = folder / "learning_rate.json"
    if curve_file.is_file():
        return float(json.loads(curve_file.read_text())["suggestion"])
    before = copy.deepcopy(module.brick.state_dict())
    rates, losses = _sweep(module, dataset)
    module.brick.load_state_dict(before)
    suggestion = steepest(rates, losses)
    curve = {"suggestion": suggestion, "learning_rate": rates, "loss": losses}
    replace_file(curve_file, json.dumps(curve).encode())
    return suggestion


def _sweep(module: BrickModule, dataset: StepDataset) -> tuple[list[float], list[float]]:
    module.backbone.slots.plug([module.brick])
    module.brick.train()
    device = module.backbone.device
    groups = [
        module.transfer_batch_to_device(dataset.group_at(i), device, 0) for i in range(BATCHES)
    ]
    with torch.no_grad():
        before = [_loss(module, group, number) for number, group in enumerate(groups)]
    begin = sum(before) / BATCHES
    optimizer = torch.optim.AdamW(module.brick.parameters(), lr=LOWEST, weight_decay=0.0)
    rates: list[float] = []
    losses: list[float] = []
    smooth = 0.0
    for step in tqdm(range(STEPS), desc="learning rate", unit="step", file=sys.stderr, leave=False):
        rate = LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        number = step % BATCHES
        loss = _loss(module, groups[number], number)
        if not math.isfinite(loss):
            if len(losses) < FEWEST:
                raise Diverged(
                    f"the loss is {loss} at a rate of {rate:.1g}", rows_of(groups[number])
                )
            break
        optimizer.step()
        smooth = SMOOTHING * smooth + (1 - SMOOTHING) * (loss - before[number])
        rates.append(rate)
        losses.append(begin + smooth / (1 - SMOOTHING ** (step + 1)))
        if len(losses) >= FEWEST and losses[-1] > BLOWN_UP * begin:
            break
    optimizer.zero_grad(set_to_none=True)
    return rates, losses


def _loss(module: BrickModule, group: list[Batch], number: int) -> float:
    """The loss of a step's micro-batches, and where gradients are on, theirs; dropout by number."""
    totals = module.totals(group)
    loss = 0.0
    for micro, batch in enumerate(group):
        reseed(module.optimisation.seed, "learning rate", number, micro)
        result = module.loss_of(batch)
        if torch.is_grad_enabled():
            module.share(result.loss, batch, totals).backward()
        loss += module.share(result.loss.item(), batch, totals)
    return loss


def steepest(rates: list[float], losses: list[float]) -> float:
    """The rate at which the loss falls fastest per decade, up to the lowest point of the curve.

    Args:
        rates: learning rates in rising order, evenly spaced in their logarithm.
        losses: the smoothed loss at each.
    """
    lowest = max(2, min(range(len(losses)), key=losses.__getitem__))

    def slope(i: int) -> float:  # over whole turns of the batches, where there is room
        start, end = max(0, i - BATCHES), min(lowest, i + BATCHES)
        return (losses[end] - losses[start]) / (end - start)

    return rates[min(range(1, lowest), key=slope)]
