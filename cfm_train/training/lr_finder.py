"""Learning-rate range test (Smith 2015, arXiv 1506.01186): raise the rate until the loss blows up.

The rate grows from `LOWEST` to `HIGHEST` over `STEPS` optimiser steps on the run's own batches;
the suggestion is where the smoothed loss falls fastest. The brick is put back as it was, so that
training starts afresh.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from cfm_train.training.dataset import StepDataset
from cfm_train.training.module import BrickModule
from cfm_train.training.objectives import count_items
from cfm_train.training.seeding import reseed

LOWEST, HIGHEST, STEPS = 1e-6, 1.0, 80
SMOOTHING = 0.9
#: The test ends when the smoothed loss exceeds the best one this many times.
BLOWN_UP = 3.0


def find_learning_rate(module: BrickModule, dataset: StepDataset, folder: Path) -> float:
    """Suggests a peak learning rate and leaves the curve in ``learning_rate.json`` of the run
    folder.

    Args:
        module: the module to train; its brick is restored afterwards.
        dataset: the run's training batches.
        folder: the run folder.
    """
    curve_file = folder / "learning_rate.json"
    if curve_file.is_file():
        return float(json.loads(curve_file.read_text())["suggestion"])
    before = copy.deepcopy(module.brick.state_dict())
    rates, losses = _sweep(module, dataset)
    module.brick.load_state_dict(before)
    suggestion = steepest(rates, losses)
    curve_file.write_text(
        json.dumps({"suggestion": suggestion, "learning_rate": rates, "loss": losses})
    )
    return suggestion


def _sweep(module: BrickModule, dataset: StepDataset) -> tuple[list[float], list[float]]:
    module.backbone.slots.plug([module.brick])
    module.brick.train()
    optimizer = torch.optim.AdamW(module.brick.parameters(), lr=LOWEST, weight_decay=0.0)
    rates: list[float] = []
    losses: list[float] = []
    smooth = 0.0
    for step in tqdm(range(STEPS), desc="learning rate", unit="step", file=sys.stderr, leave=False):
        rate = LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        batches = [
            module.transfer_batch_to_device(b, module.backbone.device, 0)
            for b in dataset.group_at(step)
        ]
        total = sum(count_items(module.specs[b["task"]].type, b) for b in batches)
        loss = 0.0
        for micro, batch in enumerate(batches):
            reseed(module.optimisation.seed, "learning rate", step, micro)
            result = module.loss_of(batch)
            (result.loss / total).backward()
            loss += result.loss.item() / total
        if not math.isfinite(loss):
            break
        optimizer.step()
        smooth = SMOOTHING * smooth + (1 - SMOOTHING) * loss
        corrected = smooth / (1 - SMOOTHING ** (step + 1))
        rates.append(rate)
        losses.append(corrected)
        if corrected > BLOWN_UP * min(losses):
            break
    return rates, losses


def steepest(rates: list[float], losses: list[float]) -> float:
    """The rate at which the loss falls fastest per decade, up to the lowest point of the curve.

    Args:
        rates: learning rates in rising order, evenly spaced in their logarithm.
        losses: the smoothed loss at each.
    """
    lowest = max(2, min(range(len(losses)), key=losses.__getitem__))
    slopes = [losses[i + 1] - losses[i - 1] for i in range(1, lowest)]
    return rates[1 + min(range(len(slopes)), key=slopes.__getitem__)]
