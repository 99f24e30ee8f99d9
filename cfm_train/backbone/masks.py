"""Attention masks that grow by virtual tokens in front, in every form that transformers hands on:

    None                    every token sees every token, or every one before it
    [batch, tokens]         1 for a real token, 0 for padding
    [batch, heads, q, k]    boolean (True = sees) or additive, a caller's own

or, made by generation for a cache of fixed size, one of these for each kind of layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def of_first_pass(mask: Tensor | Mapping[str, Tensor | None] | None, length: int) -> Tensor | None:
    """The mask of the tokens themselves, from what generation made for a cache of fixed size.

    That cannot be lengthened: it was made for the cache's places, in which virtual tokens will lie.
    A token is real where it sees itself, and the model makes the rest anew.

    Args:
        mask: any mask of generation, before anything lies in the cache.
        length: tokens of the pass.

    Returns:
        ``[batch, length]``, or None.
    """
    if isinstance(mask, Mapping):
        mask = next((part for part in mask.values() if part is not None), None)
    if mask is None or mask.ndim != 4:
        return mask
    itself = mask[:, 0, :, :length].diagonal(dim1=1, dim2=2)
    return itself.long() if itself.dtype == torch.bool else (itself >= 0).long()


def with_virtual(
    mask: Tensor | None,
    seen: Tensor,
    *,
    inserted: bool,
    real: int,
    causal: bool,
    packed: Tensor | None = None,
) -> Tensor | None:
    """A mask that covers the virtual tokens too.

    Args:
        mask: the mask over the real tokens.
        seen: ``[batch, p]`` bool: virtual tokens, False where a row has a hole.
        inserted: whether the virtual tokens are in this pass; else they lie in a cache or in
            another stack, and only keys grow.
        real: how many real tokens can be seen, those in the cache included.
        causal: whether tokens see only what is before them.
        packed: ``position_ids`` that begin anew where several texts share a row without a mask.

    Returns:
        None where every row sees all its virtual tokens and there was no mask.
    """
    if mask is None and packed is not None and causal:
        mask = texts_apart(packed.expand(seen.shape[0], -1))
    if mask is None and bool(seen.all()):
        return None
    if mask is None:
        mask = seen.new_ones(seen.shape[0], real)
    if mask.ndim == 2:
        return torch.cat([seen.to(mask.dtype), mask], dim=1)
    return _four_dimensions(mask, seen, inserted, causal)


def texts_apart(position_ids: Tensor) -> Tensor | None:
    """The mask of several texts in one row, told by positions that begin anew.

    Args:
        position_ids: ``[batch, seq]``.

    Returns:
        ``[batch, 1, seq, seq]`` bool, causal within each text; None where every row is one text.
    """
    text = (position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1).cumsum(dim=-1)
    if not bool((text[:, -1] > 0).any()):
        return None
    same = text[:, None, :, None] == text[:, None, None, :]
    return same.tril()


def _four_dimensions(mask: Tensor, seen: Tensor, inserted: bool, causal: bool) -> Tensor:
    """Columns for the virtual keys, and rows for virtual queries where they are in this pass."""
    batch, p = seen.shape
    mask = mask.expand(batch, -1, -1, -1)
    heads, queries, keys = mask.shape[1:]
    grown = torch.cat([_as(seen[:, None, None].expand(-1, heads, queries, -1), mask), mask], dim=-1)
    if not inserted:
        return grown
    among = seen[:, None, None].expand(-1, heads, p, -1)
    if causal:
        among = among.tril()
        beyond = _as(seen.new_zeros(batch, heads, p, keys), mask)
    else:  # a virtual token sees every token that any token sees
        beyond = mask.amax(dim=2, keepdim=True) if mask.is_floating_point() else mask.any(2, True)
        beyond = beyond.expand(-1, -1, p, -1)
    return torch.cat([torch.cat([_as(among, mask), beyond], dim=-1), grown], dim=2)


def _as(visible: Tensor, like: Tensor) -> Tensor:
    """A boolean mask in the form of another."""
    if not like.is_floating_point():
        return visible.to(like.dtype)
    lowest = torch.finfo(like.dtype).min
    return torch.zeros_like(visible, dtype=like.dtype).masked_fill(~visible, lowest)
