"""A site's part of its module's output, and what a brick's weight makes of it."""

from __future__ import annotations

import torch
from torch import Tensor

from cfm_train.backbone.sites import Site
from cfm_train.backbone.virtual import Weight, spread
from cfm_train.errors import UserError


def per_row(weight: Tensor, like: Tensor) -> Tensor:
    """Shapes row weights ``[batch]`` or token weights ``[batch, seq]`` to multiply ``like``.

    Generation with beams repeats every row of the batch, and some modules see ``[batch * seq, …]``:
    rows are then repeated in place.
    """
    weight = weight.to(device=like.device)
    if weight.ndim == 2 and like.ndim == 2:
        weight = weight.reshape(-1)
    elif weight.ndim == 2 and weight.shape[1] != like.shape[1]:
        raise UserError(
            f"The plan has weights for {weight.shape[1]} tokens, but the batch has "
            f"{like.shape[1]}: plug the bricks again, for another length or to generate with one "
            "weight for each row."
        )
    weight = spread(weight, like.shape[0])
    return weight.reshape(weight.shape + (1,) * (like.ndim - weight.ndim))


def blend(old: Tensor, new: Tensor, weight: Weight) -> Tensor:
    """``old + weight * (new - old)``; rows of weight 0 and 1 are ``old`` and ``new`` to the bit."""
    if weight is None:
        return new
    if isinstance(weight, (int, float)):
        return new if weight == 1 else old if weight == 0 else old + weight * (new - old)
    w = per_row(weight, old)
    mixed = old + w.to(old.dtype) * (new - old)
    return torch.where(w == 0, old, torch.where(w == 1, new, mixed))


def row_index(site: Site, device: torch.device) -> Tensor:
    """The output features ``[out_features]`` of the module that are this site, int64."""
    assert site.rows is not None
    return torch.cat([torch.arange(a, b, device=device) for a, b in site.rows])


def rows_of(y: Tensor, site: Site) -> Tensor:
    """The site's part of its module's output."""
    if site.rows is None:
        return y
    if len(site.rows) == 1:
        start, stop = site.rows[0]
        return y[..., start:stop]
    return y.index_select(-1, row_index(site, y.device))


def put_rows(y: Tensor, part: Tensor, site: Site) -> Tensor:
    """``y`` with the site's part replaced: a new tensor, so that autograd sees no write."""
    if site.rows is None:
        return part
    if len(site.rows) == 1:
        start, stop = site.rows[0]
        return torch.cat([y[..., :start], part, y[..., stop:]], dim=-1)
    return y.index_copy(-1, row_index(site, y.device), part)
