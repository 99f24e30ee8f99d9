"""Encoded rows: keys and values that are computed from a sentence encoder's vectors of a fact.

    attention(q, [K_i; K], [V_i; V])     K_i = W_k E(prompt_i) + b_k,  V_i = W_v E(told_i) + b_v

Knowledge tokens of KBLaM (Wang et al. 2024, arXiv 2410.10450): E is frozen, W and b are learned
over all facts together, one pair for each attention layer, and a fact is added or taken out without
training (`by_vector.py`). New rows are the keys and values that random tokens leave behind.

Where there is a gate, it chooses the fact of each row, and attention reads that fact alone. With
``gate.kind=none`` every fact is seen on every row and attention chooses, as in the paper. The paper
gives such keys a query head of their own; here they are found with the layer's own queries, which
the rotation of positions moves and which no training has moved towards them, so this is weaker.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from cfm_train.backbone.plugs import KV, Out
from cfm_train.backbone.virtual import Source
from cfm_train.bricks.brick import Brick, parameter_name
from cfm_train.bricks.by_vector import ByVector
from cfm_train.bricks.facts import ByFact
from cfm_train.bricks.prefix import attention_sites, token_states
from cfm_train.bricks.prompt_files import start_ids
from cfm_train.config.types import Positive

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


class EncodedRows(ByVector, ByFact, Brick):
    """Keys and values for attention layers, computed from vectors.

    Args:
        rows: how many each fact has in each layer.
        told: what a fact's values are computed from; its keys are from its prompt.
        sites: patterns of attention sites.
        layers: numbers of the layers to use, negative ones from the top; None for all.
    """

    starts_as_identity: ClassVar[bool] = False
    asked: ClassVar[tuple[str, ...]] = ("prompt",)

    def __init__(
        self,
        rows: Positive,
        told: Literal["answer", "statement"],
        sites: list[str],
        layers: list[int] | None,
    ) -> None:
        super().__init__(rows=rows, told=told, sites=sites, layers=layers)
        self.keys = nn.ModuleDict()
        self.values = nn.ModuleDict()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.begin()

    def build(self, backbone: Backbone) -> Self:
        """Makes a map to keys and one to values for every site, ``width`` to ``rows * size``."""
        self.know(backbone)
        width = self.width()
        sites = attention_sites(backbone, self.hyper["sites"], self.hyper["layers"])
        ids = start_ids(backbone, self.hyper["rows"], "vocabulary", None)
        states = token_states(backbone, ids, [site.name for site in sites])
        for site in sites:
            key = parameter_name(site.name)
            for maps, state in zip((self.keys, self.values), states[site.name], strict=True):
                affine = nn.Linear(width, state.numel())
                with torch.no_grad():
                    affine.weight.zero_()
                    affine.bias.copy_(state.flatten())
                maps[key] = affine
                self.shapes[key] = tuple(state.shape[1:])
        self.site_names = tuple(site.name for site in sites)
        return self.to(backbone.device)

    def plugs(self) -> Iterable[KV | Out]:
        """Keys and values for each site, and the plug that decides which fact acts."""
        yield self.watch()
        members = functools.partial(self.members, self.hyper["rows"])
        for name in self.site_names:
            key = parameter_name(name)
            keys, values = (self._source(maps, key, at) for at, maps in enumerate(self._maps()))
            yield KV(name, keys, values, shift=False, members=members)

    def _maps(self) -> tuple[nn.ModuleDict, nn.ModuleDict]:
        return self.keys, self.values

    def _source(self, maps: nn.ModuleDict, key: str, part: int) -> Source:
        """Rows of all facts, computed once where nothing is trained."""
        affine = cast(nn.Linear, maps[key])
        compute = functools.partial(self._rows, affine, part, self.shapes[key])
        return compute if affine.weight.requires_grad else compute()

    def _rows(self, affine: nn.Linear, part: int, shape: tuple[int, ...]) -> Tensor:
        """``[facts * rows, kv_heads, head_dim]`` float32."""
        return self.mapped(affine, part).reshape(-1, *shape)
