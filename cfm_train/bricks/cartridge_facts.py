"""Cartridges for facts: keys and values that begin as those of the fact's own text.

    attention(q, [K_i; K], [V_i; V])        K_i, V_i: of row's fact i, first token frozen

A cartridge (Eyuboglu et al. 2025, arXiv 2506.06266; `cartridge.py`) for every fact
(`bricks/facts.py`): prompt and answer are read by the bare backbone, and what they leave behind is
trained on. A text that is too long keeps its first tokens, the frozen ones, and its last, where the
answer is; one that is too short is repeated.

Rows of a batch have different facts or none, so no token may move (see `KV`): where positions are
rotary, the text is read at positions below 0, so that it lies before the prompt as if it had been
read there, for rotary attention knows distances alone. On backbones with learned positions it lies
where the prompt lies, and training has to make up for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

from cfm_train.bricks.brick import parameter_name
from cfm_train.bricks.prefix import States, attention_sites, token_states
from cfm_train.bricks.prompt_files import start_ids
from cfm_train.bricks.rows import Rows
from cfm_train.config.types import Count, Positive
from cfm_train.errors import UserError

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone

#: Texts that are read at once.
TEXTS = 32


class CartridgeFacts(Rows):
    """Keys and values that begin as those of a text, for each fact its own.

    Args:
        tokens: how many virtual tokens each fact has.
        frozen: how many at the start are never trained; fewer than ``tokens``.
        sites: patterns of attention sites.
        layers: numbers of the layers to use, negative ones from the top; None for all.
    """

    starts_as_identity: ClassVar[bool] = False

    def __init__(
        self, tokens: Positive, frozen: Count, sites: list[str], layers: list[int] | None
    ) -> None:
        super().__init__(tokens, sites, layers)
        self.hyper = {"tokens": tokens, "frozen": frozen, "sites": sites, "layers": layers}
        self.document: Tensor | None = None
        if frozen >= tokens:
            raise UserError(
                f"brick.frozen={frozen} leaves nothing to train of brick.tokens={tokens}: freeze 1."
            )

    @property
    def width(self) -> int:
        """How many virtual tokens each fact has."""
        return int(self.hyper["tokens"])

    def about(self, ids: Tensor) -> Self:
        """Notes the text ``[tokens]`` that a brick without facts starts from."""
        self.document = ids
        return self

    def build(self, backbone: Backbone) -> Self:
        """Reads every fact's text and makes its keys and values the brick's."""
        self.room(backbone)
        if not self.facts:
            ids = self.document
            if ids is None or not len(ids):
                ids = start_ids(backbone, self.width, "vocabulary", None)
            self._take(0, [token_states(backbone, self._fitting(ids), list(self.site_names))])
            return self
        texts = [self._fact_ids(backbone, at) for at in range(len(self))]
        for start in range(0, len(texts), TEXTS):
            self._take(start, self._read(backbone, texts[start : start + TEXTS]))
        return self

    def room(self, backbone: Backbone) -> Self:
        """Makes frozen and trained tokens of every site, all zero."""
        self.know(backbone)
        sites = attention_sites(backbone, self.hyper["sites"], self.hyper["layers"])
        frozen = self.hyper["frozen"]
        for site in sites:
            key = parameter_name(site.name)
            for what, learned, width in (
                ("keys", self.keys, site.head_dim),
                ("values", self.values, site.value_dim),
            ):
                zeros = torch.zeros(len(self), self.width, site.kv_heads, width)
                self.register_buffer(f"first_{what}_{key}", zeros[:, :frozen].clone())
                learned[key] = nn.Parameter(zeros[:, frozen:].clone())
        self.site_names = tuple(site.name for site in sites)
        return self.to(backbone.device)

    def stacks(self, name: str) -> tuple[Tensor, Tensor]:
        """Keys and values of a site ``[facts, tokens, kv_heads, head_dim]``, frozen ones first."""
        key = parameter_name(name)
        return (
            torch.cat([getattr(self, f"first_keys_{key}"), self.keys[key]], dim=1),
            torch.cat([getattr(self, f"first_values_{key}"), self.values[key]], dim=1),
        )

    def _take(self, start: int, read: Sequence[dict[str, States]]) -> None:
        """Makes what was read the own of the facts from ``start`` on."""
        frozen, own = self.hyper["frozen"], self.state_dict()  # shares the brick's memory
        for at, states in enumerate(read, start):
            for name, pair in states.items():
                key = parameter_name(name)
                for what, part in zip(("keys", "values"), pair, strict=True):
                    own[f"first_{what}_{key}"][at] = part[:frozen]
                    own[f"{what}.{key}"][at] = part[frozen:]

    def _fact_ids(self, backbone: Backbone, at: int) -> Tensor:
        """The tokens of a fact's text, long enough."""
        fact = self.facts[at]
        ids = backbone.tokenizer(f"{fact['prompt']} {fact['answer']}.")["input_ids"]
        if len(ids) > 1 and ids[-1] == backbone.tokenizer.eos_token_id:
            ids = ids[:-1]
        return self._repeated(torch.tensor(ids))

    def _repeated(self, ids: Tensor) -> Tensor:
        """A text, repeated where it is shorter than the cartridge."""
        if len(ids) >= self.width:
            return ids
        return ids.repeat(-(-self.width // len(ids)))[: self.width]

    def _fitting(self, ids: Tensor) -> Tensor:
        """The first tokens of a text, as many as the cartridge has."""
        return self._repeated(ids)[: self.width]

    @torch.no_grad()
    def _read(self, backbone: Backbone, texts: Sequence[Tensor]) -> list[dict[str, States]]:
        """The keys and values that texts leave behind, for each text and site."""
        longest = max(map(len, texts))
        ids = torch.zeros(len(texts), longest, dtype=torch.int64)
        mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, text in enumerate(texts):  # padded behind, where no token of the text looks
            ids[i, : len(text)], mask[i, : len(text)] = text, 1
            positions[i, : len(text)] = torch.arange(-len(text), 0)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if rotary(backbone):
            inputs["position_ids"] = positions
        inputs = {name: value.to(backbone.device) for name, value in inputs.items()}
        slots = backbone.slots
        with slots.plugged([]), slots.recording(self.site_names) as noted:
            backbone.model(**inputs, use_cache=False)
        return [
            {
                name: (self._kept(keys[i], len(text)), self._kept(values[i], len(text)))
                for name, (keys, values) in noted.items()
            }
            for i, text in enumerate(texts)
        ]

    def _kept(self, states: Tensor, length: int) -> Tensor:
        """The first tokens of ``[kv_heads, seq, head_dim]`` and the last of the text, in front."""
        states, frozen = states[:, :length].transpose(0, 1).float(), self.hyper["frozen"]
        return torch.cat([states[:frozen], states[length - self.width + frozen :]])


def rotary(backbone: Backbone) -> bool:
    """Whether positions are angles that are computed, so that those below 0 have a meaning."""
    return any(hasattr(module, "inv_freq") for module in backbone.model.modules())
