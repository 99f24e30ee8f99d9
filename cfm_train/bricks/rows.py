"""Rows: a few keys and values that attention sees beside the text's own, without a position.

    attention(q, [K_r; K], [V_r; V])        K_r, V_r learned: with facts, rows of each fact

A prefix (`prefix.py`) whose rows move nothing, so that one more or one less leaves all other tokens
where they are: a row is a fact, as in KBLaM (Wang et al. 2024, arXiv 2410.10450), learned here
instead of computed. New rows are the keys and values that random tokens leave behind.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Self

from torch import Tensor, nn

from cfm_train.backbone.plugs import KV, Out
from cfm_train.bricks.brick import Brick, parameter_name
from cfm_train.bricks.facts import ByFact
from cfm_train.bricks.prefix import attention_sites, token_states
from cfm_train.bricks.prompt_files import start_ids
from cfm_train.config.types import Positive

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


class Rows(ByFact, Brick):
    """Keys and values for attention layers.

    Args:
        rows: how many in each layer; for each fact where there are facts.
        sites: patterns of attention sites.
        layers: numbers of the layers to use, negative ones from the top; None for all.
    """

    starts_as_identity: ClassVar[bool] = False

    def __init__(self, rows: Positive, sites: list[str], layers: list[int] | None) -> None:
        super().__init__(rows=rows, sites=sites, layers=layers)
        self.keys = nn.ParameterDict()
        self.values = nn.ParameterDict()
        self.begin()

    def build(self, backbone: Backbone) -> Self:
        """Makes the rows of every site ``[facts, rows, kv_heads, head_dim]``, all facts alike."""
        self.know(backbone)
        sites = attention_sites(backbone, self.hyper["sites"], self.hyper["layers"])
        ids = start_ids(backbone, self.hyper["rows"], "vocabulary", None)
        states = token_states(backbone, ids, [site.name for site in sites])
        for site in sites:
            for stack, state in zip((self.keys, self.values), states[site.name], strict=True):
                many = state.expand(len(self), *state.shape).clone()
                stack[parameter_name(site.name)] = nn.Parameter(many)
        self.site_names = tuple(site.name for site in sites)
        return self.to(backbone.device)

    @property
    def width(self) -> int:
        """How many rows each fact has."""
        return int(self.hyper["rows"])

    def stacks(self, name: str) -> tuple[Tensor, Tensor]:
        """Keys and values of a site, ``[facts, width, kv_heads, head_dim]`` each."""
        key = parameter_name(name)
        return self.keys[key], self.values[key]

    def plugs(self) -> Iterable[KV | Out]:
        """Keys and values for each site, and the plug that decides which fact acts."""
        if self.facts:
            yield self.watch()
        for name in self.site_names:
            part = functools.partial(self._flat, name)
            yield KV(
                name,
                functools.partial(part, 0),
                functools.partial(part, 1),
                shift=False,
                members=functools.partial(self.members, self.width) if self.facts else None,
            )

    def _flat(self, name: str, which: int) -> Tensor:
        """The keys (0) or values (1) of a site, fact after fact."""
        return self.stacks(name)[which].flatten(0, 1)
