"""Between PEFT's modules and our sites: what the bricks in PEFT's format share.

PEFT names modules, we name sites; where an architecture fuses several sites into one module
(GPT-2's c_attn is q, k and v), one module of PEFT's is several sites of ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cfm_train.backbone.rows import row_index
from cfm_train.bricks.brick import LINEAR
from cfm_train.errors import UserError

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.backbone.sites import Site

#: What PEFT puts before the path of every module.
PREFIX = "base_model.model."
#: PEFT's name for what a backbone is used for.
TASK_TYPES = {
    "encoder": "FEATURE_EXTRACTION",
    "decoder": "CAUSAL_LM",
    "encoder-decoder": "SEQ_2_SEQ_LM",
}


def find_site(backbone: Backbone, module: str) -> Site:
    """The whole linear site of a module path, which may carry or lack a wrapper's prefix.

    PEFT names modules from the class that it wrapped: a ``BertForSequenceClassification`` puts
    ``bert.`` before what a ``BertModel`` calls ``encoder.layer.0…``.

    Args:
        backbone: where the adapter is to be plugged in.
        module: the path as PEFT wrote it, without `PREFIX`.

    Raises:
        UserError: there is no such linear module, or there are two.
    """
    named = backbone.sites.get(module)
    if named is not None and named.module == module and named.kind in LINEAR and named.rows is None:
        return named  # sites that are named like their modules
    whole = [s for s in backbone.sites.values() if s.kind in LINEAR and s.rows is None]
    same = {s.module: s for s in whole if s.module == module}
    close = same or {
        s.module: s
        for s in whole
        if module.endswith(f".{s.module}") or s.module.endswith(f".{module}")
    }
    if not close:
        raise UserError(
            f"The adapter updates the module '{module}', which the backbone '{backbone.id}' does "
            "not have as a linear layer: it was trained on another model."
        )
    if len(close) > 1:
        raise UserError(
            f"The adapter's module '{module}' may be any of {', '.join(sorted(close))} of the "
            f"backbone '{backbone.id}': save it from the whole model, so that its names say which."
        )
    return next(iter(close.values()))


def pattern_value(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that fits the end of the module's path, else the default."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def rows_in(site: Site, width: int) -> Tensor:
    """The rows of a module's output ``[width]`` that are a site, int64 on the processor."""
    return torch.arange(width) if site.rows is None else row_index(site, torch.device("cpu"))


def overlap(one: Site, other: Site) -> bool:
    """Whether two sites are parts of one module and share an output row."""
    if one.module != other.module:
        return False
    if one.rows is None or other.rows is None:
        return True
    return any(a < d and c < b for a, b in one.rows for c, d in other.rows)
