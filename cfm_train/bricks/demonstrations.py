"""Demonstrations in a prompt: contexts made from a task's rows, and what a model makes of them.

A context is a few rows with their answers, as earlier turns of one conversation, and a last row
without:

    prompt_1 answer_1 … prompt_n answer_n query

All prompts of a task end alike (``### Assistant:⏎``, an arrow, a chat template's mark): that ending
is found here, so that the place where an answer begins can be told from token ids alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cfm_train.data.conversations import Message, write
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
    """One row.

    Attributes:
        prompt: token ids of what is asked.
        answer: token ids of the last answer, with the mark that ends it.
        messages: the conversation, its last message the answer.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    messages: tuple[Message, ...]


def examples(encoded: Encoded) -> list[Example]:
    """The rows of an ``instruct`` split that have both prompt and answer."""
    found = []
    for i in range(len(encoded)):
        ids = encoded.slice("input_ids", i).tolist()
        start = int(encoded.arrays["answer_starts"][i])
        if 0 < start < len(ids):
            messages = tuple(encoded.row(i)["messages"])
            found.append(Example(tuple(ids[:start]), tuple(ids[start:]), messages))
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


def ends_here(ids: Tensor, ending: Tensor) -> Tensor:
    """Where a prompt ends: ``[batch, seq]`` bool, True on the last token of each ``ending``.

    Args:
        ids: token ids ``[batch, seq]``.
        ending: what `common_ending` found, int64.
    """
    size = len(ending)
    if ids.shape[1] < size:
        return torch.zeros_like(ids, dtype=torch.bool)
    there = (ids.unfold(1, size, 1) == ending.to(ids.device)).all(dim=-1)
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
            f"brick.demonstrations={demonstrations} needs more training rows than that, but there "
            f"are {len(rows)}: ask for fewer, or give more rows."
        )
    config = backbone.model.config
    limit = min(
        backbone.tokenizer.model_max_length, getattr(config, "max_position_embeddings", 2**30)
    )
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(contexts):
        drawn = [rows[i] for i in generator.choice(len(rows), demonstrations + 1, replace=False)]
        query, shown = drawn[0], drawn[1:]
        ids = in_context(query, shown, backbone.tokenizer)
        while shown and len(ids) > limit:
            shown.pop()
            ids = in_context(query, shown, backbone.tokenizer)
        if not shown:
            raise UserError(
                f"Not one demonstration and a query fit into the {limit} tokens that the backbone "
                f"'{backbone.id}' reads: shorten the rows (data.max_length)."
            )
        made.append(Context(ids, list(query.prompt)))
    return made


def in_context(query: Example, shown: Sequence[Example], tokenizer: Any) -> list[int]:
    """The token ids of a query behind demonstrations, as earlier turns of one conversation."""
    system = [m for m in query.messages if m["role"] == "system"]
    turns = [m for row in shown for m in row.messages if m["role"] != "system"]
    asked = [m for m in query.messages[:-1] if m["role"] != "system"]
    text = write([*system, *turns, *asked], tokenizer, prompt=True)
    if not tokenizer.chat_template and tokenizer.eos_token:
        # Behind its end-of-text mark a plain language model would begin something new.
        text = text.replace(tokenizer.eos_token, "")
    special = not tokenizer.chat_template  # a template writes its own
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


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
            # Each token of the answer is told from the token before it.
            targets[i, len(prompt) - 1 : size - 1] = torch.tensor(answer)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        logits = backbone.logits(**{k: v.to(backbone.device) for k, v in inputs.items()}).float()
        losses = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten().to(logits.device), reduction="sum"
        )
        total += losses.item()
        count += int((targets != -100).sum())
    return total / max(1, count)
