"""Demonstrations in a prompt: contexts made from a task's rows, and what a model makes of them.

A context is a few rows with their answers, one behind the other, and a last row without:

    prompt_1 answer_1 ⏎⏎ … prompt_n answer_n ⏎⏎ query

All prompts of a task end alike (``### Assistant:⏎``, an arrow, a chat template's mark): that ending is
found here, so that the place where an answer begins can be told from token ids alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cfm_train.errors import UserError

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.data.encode import Encoded

#: An ending longer than this is cut at its front: it is specific enough.
LONGEST_ENDING = 16
#: Rows that are scored together.
ROWS = 16


@dataclass(frozen=True)
class Example:
    """One row as token ids: what is asked, and the last answer with the mark that ends it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def examples(encoded: Encoded) -> list[Example]:
    """The rows of an ``instruct`` split that have both prompt and answer."""
    found = []
    for i in range(len(encoded)):
        ids = encoded.slice("input_ids", i).tolist()
        start = int(encoded.arrays["answer_starts"][i])
        if 0 < start < len(ids):
            found.append(Example(tuple(ids[:start]), tuple(ids[start:])))
    return found


def common_ending(rows: Sequence[Example]) -> tuple[int, ...]:
    """The token ids that all prompts end with, the last few of them; empty where they do not."""
    ending = rows[0].prompt[-LONGEST_ENDING:]
    for row in rows:
        shared = 0
        for a, b in zip(reversed(ending), reversed(row.prompt), strict=False):
            if a != b:
                break
            shared += 1
        ending = ending[len(ending) - shared :]
    return ending


def ends_here(ids: Tensor, ending: Sequence[int]) -> Tensor:
    """Where a prompt ends: ``[batch, seq]`` bool, True on the last token of each ``ending``.

    Args:
        ids: token ids ``[batch, seq]``.
        ending: what `common_ending` found.
    """
    size = len(ending)
    if ids.shape[1] < size:
        return torch.zeros_like(ids, dtype=torch.bool)
    wanted = torch.tensor(ending, device=ids.device)
    there = (ids.unfold(1, size, 1) == wanted).all(dim=-1)
    return F.pad(there, (size - 1, 0))


@dataclass(frozen=True)
class Context:
    """Token ids of a query behind demonstrations, and of the query alone."""

    shown: list[int]
    alone: list[int]


def draw_contexts(
    rows: Sequence[Example], demonstrations: int, contexts: int, backbone: Backbone, seed: int
) -> list[Context]:
    """Contexts of randomly drawn rows, as many demonstrations in each as fit.

    Args:
        rows: the rows to draw from.
        demonstrations: how many go before each query.
        contexts: how many are made.
        backbone: its tokenizer, and how many tokens it reads at most.
        seed: draws the rows.

    Raises:
        UserError: there are too few rows, or not one demonstration fits.
    """
    if len(rows) <= demonstrations:
        raise UserError(
            f"brick.demonstrations={demonstrations} needs more than {demonstrations} training rows, "
            f"but there are {len(rows)}: ask for fewer, or give more rows."
        )
    tokenizer = backbone.tokenizer
    gap = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    config = backbone.model.config
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 2**30))
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(contexts):
        drawn = [rows[i] for i in generator.choice(len(rows), demonstrations + 1, replace=False)]
        query = list(drawn[0].prompt)
        parts = [[*row.prompt, *_without(row.answer, tokenizer.eos_token_id)] for row in drawn[1:]]
        while parts and len(_chained([*parts, query], gap, tokenizer.bos_token_id)) > limit:
            parts.pop()
        if not parts:
            raise UserError(
                f"Not one demonstration and a query fit into the {limit} tokens that the backbone "
                f"'{backbone.id}' reads: shorten the rows (data.max_length)."
            )
        made.append(Context(_chained([*parts, query], gap, tokenizer.bos_token_id), query))
    return made


def _without(ids: Sequence[int], mark: int | None) -> list[int]:
    """An answer without the end-of-text mark, behind which a model would begin something new."""
    return list(ids[:-1]) if ids and ids[-1] == mark else list(ids)


def _chained(parts: Sequence[Sequence[int]], gap: Sequence[int], begin: int | None) -> list[int]:
    chained = list(parts[0])
    for part in parts[1:]:
        chained += [*gap, *(part[1:] if part[0] == begin else part)]
    return chained


@torch.no_grad()
def answer_loss(backbone: Backbone, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float:
    """Mean nats per answer token with what is plugged in now.

    Args:
        backbone: a language model.
        rows: (prompt, answer) as token ids.
    """
    total, count = 0.0, 0
    order = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    for start in range(0, len(order), ROWS):
        part = order[start : start + ROWS]
        width = max(len(p) + len(a) for p, a in part)
        ids = torch.full((len(part), width), backbone.tokenizer.pad_token_id)
        mask, targets = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (prompt, answer) in enumerate(part):
            size = len(prompt) + len(answer)
            ids[i, :size] = torch.tensor([*prompt, *answer])
            mask[i, :size] = 1
            targets[i, len(prompt) - 1 : size - 1] = torch.tensor(
                answer
            )  # each from the one before
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        logits = backbone.logits(**{k: v.to(backbone.device) for k, v in inputs.items()}).float()
        losses = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten().to(logits.device), reduction="sum"
        )
        total += losses.item()
        count += int((targets != -100).sum())
    return total / max(1, count)
