"""Position ids of a sequence that has virtual tokens in front, row by row.

    virtual tokens    0 … n - 1        n of that row: another row may have none
    real tokens       n + what they would be alone

so that a row without virtual tokens keeps the positions of its solo run, and one with n of them has
those that PEFT gives it.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from cfm_train.errors import UserError


def position_table(stack: nn.Module, embed: nn.Module) -> nn.Embedding | None:
    """A stack's table of learned positions, None where positions are computed.

    Args:
        stack: the stack's module.
        embed: its table of tokens, which is as large at times.
    """
    most = getattr(getattr(stack, "config", None), "max_position_embeddings", None)
    if most is None:
        return None
    for table in stack.modules():
        if isinstance(table, nn.Embedding) and table is not embed and table.num_embeddings >= most:
            return table
    return None


def first_position(table: nn.Embedding | None) -> int:
    """The position of the first token: RoBERTa's kind of table begins behind its padding token."""
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


def alone(
    ids: Tensor | None,
    mask: Tensor | None,
    length: int,
    before: int,
    table: nn.Embedding | None,
    device: torch.device,
) -> Tensor:
    """The positions that a stack gives its tokens by itself: ``[1 or batch, length]`` int64.

    Args:
        ids: token ids ``[batch, length]``, None where embeddings were given.
        mask: ``[batch, before + length]``, or None.
        length: tokens of the pass.
        before: real tokens that lie in the cache.
        table: the table of learned positions.
        device: where to.
    """
    padding = None if table is None else table.padding_idx
    if padding is not None and ids is not None:
        real = ids.ne(padding).long()
        return (real.cumsum(1) + before) * real + padding
    if mask is not None and mask.ndim == 2 and table is not None and _counts_by_mask(table):
        real = mask.long()
        return (real.cumsum(1) * real - 1)[:, before:]
    return (torch.arange(length, device=device) + before + first_position(table))[None]


def _counts_by_mask(table: nn.Embedding) -> bool:
    """Whether a table numbers tokens by the mask, as OPT's does."""
    return "attention_mask" in inspect.signature(table.forward).parameters


def behind(
    own: Tensor,
    seen: Tensor | None,
    moved: Tensor,
    *,
    inserted: bool,
    longest: int,
    table: nn.Embedding | None,
) -> Tensor:
    """The positions behind virtual tokens, and those of the virtual ones that are in the pass.

    Args:
        own: ``[…, 1 or batch, length]``, the tokens' positions alone.
        seen: ``[batch, p]`` bool, virtual embeddings (False in a hole); None for none.
        moved: ``[batch]`` int64, virtual keys and values that lie before everything.
        inserted: whether the virtual embeddings are in this pass, else they lie in the cache.
        longest: real tokens of the longest row, those in the cache included.
        table: the table of learned positions.

    Returns:
        ``[…, batch, length]``, or ``p + length``.

    Raises:
        UserError: there are more positions than the model has learned.
    """
    bound = longest + first_position(table) + int(moved.max())
    bound += 0 if seen is None else seen.shape[1]
    moved = moved.to(own.device)[:, None]
    positions = own + moved
    if seen is not None:
        positions = positions + seen.sum(dim=1, keepdim=True)
    if seen is not None and inserted:
        virtual = (seen.cumsum(1) - 1).clamp_min(0) + moved + first_position(table)
        virtual = virtual.expand(*positions.shape[:-1], -1)
        positions = torch.cat([virtual, positions], dim=-1)
    # The bound first: reading a tensor's values makes the processor wait for the device.
    if (
        table is not None
        and bound > table.num_embeddings
        and int(positions.max()) >= table.num_embeddings
    ):
        length = own.shape[-1]
        raise UserError(
            f"{length} tokens behind {int(positions.max()) + 1 - length} others need more than the "
            f"{table.num_embeddings} positions that the backbone has learned: shorten the texts "
            "(data.max_length) or the prompt."
        )
    return positions
