"""Map: vectors of what is known about a subject, added to the embeddings of its mention.

    x_t ← x_t + (W e_i + b)_k       t: the last tokens of each mention of fact i's subject

Map-tuning (Zhang et al. 2023, arXiv 2305.17691) puts a mapped entity vector beside the mention, as
a token of its own. Here it is added to the mention's own tokens: no token moves, so texts keep
their length, their positions and their cache. W and b are learned over all facts together, and a
fact is added or taken out without training (`by_vector.py`). They start as zero: a new brick
changes nothing.

A fact acts where the gate says, with ``gate.kind=none`` wherever its subject is mentioned. A pass
of a single token goes on with a prompt, which holds the vectors already, and gets none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from cfm_train.backbone.plugs import Call, Out
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.by_vector import ByVector
from cfm_train.bricks.facts import ByFact
from cfm_train.bricks.mention import mentioned
from cfm_train.config.types import Positive
from cfm_train.data.facts import normalised

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


class Map(ByVector, ByFact, Brick):
    """An affine map from vectors to embeddings.

    Args:
        tokens: embeddings of each fact, for the last tokens of a mention: the last of them for its
            last token, and so on; a shorter mention goes without the first ones.
        told: what a fact's vector is made of; ``vector`` for those that come with the facts.
    """

    granularity: ClassVar[str] = "model"

    def __init__(self, tokens: Positive, told: Literal["answer", "statement", "vector"]) -> None:
        super().__init__(tokens=tokens, told=told)
        self.begin()

    def build(self, backbone: Backbone) -> Self:
        """Makes the map, ``width`` to ``tokens * hidden``, of zeros."""
        self.know(backbone)
        width = self.width()  # refuses a brick without facts, on any family
        size = backbone.sites["embed"].out_features
        self.affine = nn.Linear(width, self.hyper["tokens"] * size)
        nn.init.zeros_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)
        self.site_names = ("embed",)
        return self.to(backbone.device)

    def plugs(self) -> Iterable[Out]:
        """The plug that decides which fact acts, then the one that adds its vectors."""
        yield self.watch()
        yield Out("embed", self._add)

    def _add(self, call: Call) -> Tensor:
        assert call.y is not None
        ids, y, tokens = call.x, call.y, self.hyper["tokens"]
        if ids.shape[1] == 1:
            return y
        found = self._found(ids)
        facts = sorted({fact for _, fact, _ in found})
        if not facts:
            return y
        # One entry for each embedding that is added: row, token, fact, which of its embeddings.
        at = torch.tensor(
            [
                (row, last - back, facts.index(fact), tokens - 1 - back)
                for row, fact, (first, last) in found
                for back in range(min(tokens, last - first + 1))
            ],
            device=y.device,
        ).T
        mapped = self.mapped(self.affine, 0, torch.tensor(facts, device=y.device))
        added = mapped.unflatten(1, (tokens, -1))[at[2], at[3]].to(y.dtype)
        return y + torch.zeros_like(y).index_put((at[0], at[1]), added, accumulate=True)

    def _found(self, ids: Tensor) -> list[tuple[int, int, tuple[int, int]]]:
        """Mentions of subjects whose facts act: row, fact, first and last token."""
        tokenizer = cast(Any, self)._backbone.tokenizer
        if self.gate is None and self.chosen is None:
            texts = map(normalised, tokenizer.batch_decode(ids, skip_special_tokens=True))
            subjects = [normalised(fact["subject"]) for fact in self.facts]
            acting = [[f for f, name in enumerate(subjects) if name in text] for text in texts]
        else:
            acting = [[fact] if fact >= 0 else [] for fact in self.places(len(ids)).tolist()]
        return [
            (row, fact, span)
            for row, (own, facts) in enumerate(zip(ids.tolist(), acting, strict=True))
            for fact in facts
            for span in mentioned(tokenizer, own, self.facts[fact]["subject"])
        ]
