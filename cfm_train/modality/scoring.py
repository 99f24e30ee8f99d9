"""Classes scored by a language model: log p(name | prompt), the prompt computed once for all.

    prompt with its items ─► keys and values, kept ─► each class's tokens behind, in one batch

A name is scored with the token that ends it, so that no name is the beginning of another's score.
``mean`` divides by the number of tokens, ``sum`` is the probability itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cfm_train.backbone.load import Backbone


@torch.inference_mode()
def class_scores(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    classes: Sequence[Sequence[int]],
    batch: Mapping[str, Any],
    score: str,
) -> np.ndarray:
    """Scores of every class after some prompts, as the backbone is plugged now.

    Args:
        backbone: a language model.
        prompts: token ids of each row, placeholders among them; all of one length.
        classes: token ids of each name, its end included.
        batch: the features of the rows' items, see `Modality.take`.
        score: ``sum`` or ``mean`` of the log probabilities.

    Returns:
        float64 ``[rows, classes]``.
    """
    rows, device = len(prompts), backbone.device
    ids = torch.tensor([list(prompt) for prompt in prompts], device=device)
    backbone.slots.take(batch)
    first = backbone.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **_last(backbone)
    )
    before = first.logits[:, -1].float().log_softmax(-1)  # [rows, vocabulary]
    names, there = _padded(classes, device)
    found = before[:, names[:, 0]].double()  # [rows, classes]
    if names.shape[1] > 1:
        cache = first.past_key_values
        cache.batch_repeat_interleave(len(classes))
        inputs = names[:, :-1].repeat(rows, 1)
        seen = torch.ones(len(inputs), ids.shape[1], dtype=torch.int64, device=device)
        mask = torch.cat([seen, there[:, :-1].repeat(rows, 1).long()], dim=1)
        logits = backbone.model(
            input_ids=inputs, attention_mask=mask, past_key_values=cache, use_cache=True
        ).logits
        nats = F.cross_entropy(
            logits.float().transpose(1, 2), names[:, 1:].repeat(rows, 1), reduction="none"
        )
        told = -(nats.double() * there[:, 1:].repeat(rows, 1)).sum(dim=1)
        found = found + told.view(rows, len(classes))
    if score == "mean":
        found = found / there.sum(dim=1)
    return found.cpu().numpy()


def _last(backbone: Backbone) -> dict[str, Any]:
    import inspect

    takes = "logits_to_keep" in inspect.signature(backbone.model.forward).parameters
    return {"logits_to_keep": 1} if takes else {}


def _padded(classes: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Names ``[classes, longest]`` and where they have tokens, bool."""
    longest = max(len(name) for name in classes)
    names = torch.zeros(len(classes), longest, dtype=torch.int64)
    there = torch.zeros(len(classes), longest, dtype=torch.bool)
    for i, name in enumerate(classes):
        names[i, : len(name)] = torch.tensor(list(name))
        there[i, : len(name)] = True
    return names.to(device), there.to(device)
