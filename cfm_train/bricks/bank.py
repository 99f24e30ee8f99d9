"""The bank: all low-rank bricks of a site in one pair of matrix products.

    y = base + ((x A_catᵀ) ⊙ C) B_catᵀ

``A_cat`` stacks the bricks' ``lora_A`` (rows), ``B_cat`` their ``lora_B`` (columns), and ``C``
holds scale times row or token weight for each rank: any mix of ranks, one brick for all rows or
another for every row (Hu et al. 2021, arXiv 2106.09685; batching over adapters as in Punica, arXiv
2310.18547).

DoRA (Liu et al. 2024, arXiv 2402.09353) scales the adapted weight's rows to a learned magnitude m:

    y = bias + m / ‖W + sBA‖ ⊙ (Wx + sBAx),     the norm is a constant for the gradient

so its update depends on the base output and is added as a difference to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfm_train.backbone.plugs import Together
from cfm_train.backbone.rows import blend, per_row, put_rows, row_index, rows_of
from cfm_train.backbone.sites import Site, SiteMap
from cfm_train.backbone.virtual import Weight


@dataclass(frozen=True, slots=True)
class LowRank(Together):
    """A low-rank update of one linear site.

    Attributes:
        site: name of the site.
        A: ``[rank, in_features]`` float32, ``lora_A`` on disk.
        B: ``[out_features, rank]`` float32, ``lora_B`` on disk.
        scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732).
        dropout: probability of dropping an input feature while training.
        magnitude: ``[out_features]`` float32 for DoRA, else None.
        bias: ``[out_features]`` float32, or None.
        bias_replaces: whether the bias stands in place of the module's own (PEFT's ``lora_only``);
            otherwise scale times it is added (PEFT's ``lora_bias``).
        brick: the module that owns the parameters; its ``training`` flag switches dropout.
    """

    site: str
    A: Tensor
    B: Tensor
    scale: float
    dropout: float
    magnitude: Tensor | None
    bias: Tensor | None
    bias_replaces: bool
    brick: nn.Module

    @staticmethod
    def run(
        sites: SiteMap,
        module: nn.Module,
        x: Tensor,
        base: Tensor,
        entries: Sequence[tuple[LowRank, Weight]],
    ) -> Tensor:
        """The module's output with every low-rank brick of its sites.

        Args:
            sites: the backbone's sites.
            module: the backbone's linear module.
            x: its input ``[batch, seq, in_features]``.
            base: its output ``[batch, seq, out_features]``.
            entries: the plugs and the weights of their bricks.
        """
        y = base
        by_site: dict[str, list[tuple[LowRank, Weight]]] = {}
        for entry in entries:
            by_site.setdefault(entry[0].site, []).append(entry)
        for name, group in by_site.items():
            site = sites[name]
            plain = [e for e in group if e[0].magnitude is None and not _drops(e[0])]
            y = _add_concatenated(y, x, plain, module, site) if plain else y
            for plug, weight in group:
                if plug.magnitude is not None:
                    old = rows_of(y, site)
                    new = old + _dora(plug, module, x, rows_of(base, site), site)
                    y = put_rows(y, blend(old, new, weight), site)
                elif _drops(plug):
                    dropped = F.dropout(x, plug.dropout)
                    y = _add_concatenated(y, dropped, [(plug, weight)], module, site)
        return y


def _drops(plug: LowRank) -> bool:
    return plug.dropout > 0 and plug.brick.training


def _add_concatenated(
    y: Tensor,
    x: Tensor,
    entries: Sequence[tuple[LowRank, Weight]],
    module: nn.Module,
    site: Site,
) -> Tensor:
    """``y + ((x A_catᵀ) ⊙ C) B_catᵀ`` in the backbone's dtype."""
    dtype = y.dtype
    if len(entries) == 1:
        plug, weight = entries[0]
        A, B = plug.A.to(dtype), plug.B.to(dtype)
    else:
        A = torch.cat([plug.A for plug, _ in entries]).to(dtype)
        B = torch.cat([plug.B for plug, _ in entries], dim=1).to(dtype)
    h = F.linear(x.to(dtype), A)  # [batch, seq, sum of ranks]
    h = _coefficients(h, entries)
    if site.rows is None and all(plug.bias is None for plug, _ in entries):
        # One pass over the large output: the product is accumulated onto it.
        flat = torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), B.t())
        return flat.view(y.shape)
    update = F.linear(h, B)
    for plug, weight in entries:
        shift = _shift(plug, module, site)
        if shift is not None:
            update = update + _weighted(shift.to(dtype).expand_as(update), weight)
    return put_rows(y, rows_of(y, site) + update, site)


def _coefficients(h: Tensor, entries: Sequence[tuple[LowRank, Weight]]) -> Tensor:
    """``h ⊙ C``: scale times weight, for each rank of each brick."""
    if len(entries) == 1 and not isinstance(entries[0][1], Tensor):
        plug, weight = entries[0]
        factor = plug.scale * (1.0 if weight is None else weight)
        return h if factor == 1 else h * factor
    parts = []
    start = 0
    for plug, weight in entries:
        rank = plug.A.shape[0]
        parts.append(_weighted(h[..., start : start + rank] * plug.scale, weight))
        start += rank
    return torch.cat(parts, dim=-1)


def _weighted(values: Tensor, weight: Weight) -> Tensor:
    if weight is None:
        return values
    if isinstance(weight, Tensor):
        return values * per_row(weight, values).to(values.dtype)
    return values * weight


def weight_of(module: nn.Module, site: Site) -> Tensor:
    """The site's weight ``[out_features, in_features]``, whatever the module's layout."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    weight = weight.t() if site.transposed else weight
    return weight if site.rows is None else weight[row_index(site, weight.device)]


def bias_of(module: nn.Module, site: Site) -> Tensor | None:
    """The site's bias ``[out_features]``, None where the module has none."""
    bias: Tensor | None = getattr(module, "bias", None)
    if bias is None or site.rows is None:
        return bias
    return bias[row_index(site, bias.device)]


def row_norms(module: nn.Module, site: Site) -> Tensor:
    """‖W‖ of every output row, ``[out_features]`` float32: a new DoRA brick's magnitude."""
    return _norms(weight_of(module, site).detach().float())


def _norms(weight: Tensor) -> Tensor:
    # One memory layout, so that equal weights have norms equal to the bit.
    return weight.contiguous().norm(dim=1)


def _shift(plug: LowRank, module: nn.Module, site: Site) -> Tensor | None:
    """What a brick's bias adds to the output, ``[out_features]`` float32; None without a bias."""
    if plug.bias is None:
        return None
    if not plug.bias_replaces:
        return plug.scale * plug.bias
    own = bias_of(module, site)
    return plug.bias if own is None else plug.bias - own.float()


def _dora(plug: LowRank, module: nn.Module, x: Tensor, base: Tensor, site: Site) -> Tensor:
    """DoRA's update: the adapted output minus the base output, in the backbone's dtype."""
    assert plug.magnitude is not None
    dtype = base.dtype
    weight = weight_of(module, site)
    adapted = weight.float() + plug.scale * (plug.B @ plug.A)
    ratio = plug.magnitude / _norms(adapted.detach())  # [out_features] float32
    if _drops(plug):  # the frozen part sees the dropped input too, as in PEFT
        x = F.dropout(x, plug.dropout)
        straight = F.linear(x, weight)
    else:
        bias = bias_of(module, site)
        straight = base if bias is None else base - bias
    low = F.linear(F.linear(x.to(dtype), plug.A.to(dtype)), plug.B.to(dtype))
    # ratio - 1 is small: rounded after the subtraction, never before.
    update = (ratio - 1).to(dtype) * straight + (ratio * plug.scale).to(dtype) * low
    shift = _shift(plug, module, site)
    return update if shift is None else update + shift.to(dtype)
