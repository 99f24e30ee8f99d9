"""Sees what flows through sites, and changes nothing: how statistics of a brick are gathered.

A statistic is one file in this room with a function ``gather``; a merge rule names it as what it
`needs`. It is computed with the brick plugged in, on rows of the task that the brick was trained
on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfm_train.backbone.load import Backbone
from cfm_train.backbone.plugs import Call, Out
from cfm_train.bricks.brick import Brick
from cfm_train.data.encode import TaskData
from cfm_train.errors import UserError
from cfm_train.training.dataset import make_batch
from cfm_train.training.objectives import Batch

#: Padded tokens of a batch.
TOKENS = 4096


@dataclass
class Observer:
    """A plug on the output of some sites that keeps what it sees of one forward pass.

    Attributes:
        sites: names of linear sites.
        gradients: whether gradients of the outputs are wanted.
        inputs: site -> the module's input ``[batch, seq, in]``.
        outputs: site -> zeros ``[batch, seq, out]`` added to the site's output, whose gradient is
            the output's.
    """

    sites: Sequence[str]
    gradients: bool
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def plugs(self) -> Iterable[Out]:
        """One for each site."""
        for site in self.sites:
            yield Out(site, functools.partial(self._see, site))

    def _see(self, site: str, call: Call) -> Tensor:
        assert call.y is not None
        self.inputs[site] = call.x.detach()
        if not self.gradients:
            return call.y
        self.outputs[site] = torch.zeros_like(call.y, requires_grad=True)
        return call.y + self.outputs[site]


def batches(task: TaskData, rows: int, seed: int, backbone: Backbone) -> Iterator[Batch]:
    """Some of a task's training rows, drawn by seed, in batches of similar length.

    Args:
        task: the task.
        rows: how many rows; all where there are fewer.
        seed: decides which.
        backbone: for its padding token and device.
    """
    encoded = task.train
    chosen = np.random.default_rng(seed).permutation(len(encoded))[:rows]
    lengths = encoded.lengths if encoded.lengths.ndim == 1 else encoded.lengths.max(axis=1)
    chosen = chosen[np.argsort(lengths[chosen], kind="stable")]
    start = 0
    while start < len(chosen):
        stop = start + 1
        while stop < len(chosen) and lengths[chosen[stop]] * (stop + 1 - start) <= TOKENS:
            stop += 1
        batch = make_batch(
            task.spec.name, encoded, chosen[start:stop], backbone.tokenizer.pad_token_id
        )
        yield {k: v.to(backbone.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        start = stop


def real(x: Tensor, batch: Mapping[str, Any], site: str) -> Tensor:
    """Which positions of a site's input are real tokens, bool ``[batch, seq]``.

    Raises:
        UserError: the site sees other positions than the batch has.
    """
    mask: Tensor = batch["attention_mask"].bool()
    if x.shape[:2] != mask.shape:
        raise UserError(
            f"Site '{site}' sees {tuple(x.shape[:2])} positions where the batch has "
            f"{tuple(mask.shape)}, so padding cannot be told apart: statistics are gathered on the "
            "sites of one stack that reads the input."
        )
    return mask


def observed_sites(bricks: Sequence[Brick], backbone: Backbone) -> list[str]:
    """Every site that one of the bricks changes, in the backbone's order."""
    named = {site for brick in bricks for site in brick.site_names}
    return [name for name in backbone.sites if name in named]
