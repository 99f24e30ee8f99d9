"""A modality brick: what lets a frozen language model read a frozen encoder's features.

    features [n, d_v] ─► standardised ─► connector ─► [begin?, tokens [m, d], end?]
                     ─► in place of the placeholders among the token ids

Its parameters are the connector's and two learned tags. Neither the encoder nor the language model
is part of it: the card names both by fingerprint. With no item in the input it does nothing at all,
so the language model's text stays what it was, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from cfm_train.backbone.plugs import Plug, Tokens
from cfm_train.bricks.brick import Brick
from cfm_train.errors import UserError
from cfm_train.modality.connectors.connector import make_connector

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone

#: The placeholder's id where a run has one modality brick; others get ids below it.
SENTINEL = -2


class Modality(Brick):
    """A connector between one encoder and one language model.

    Args:
        modality: what the items are called: ``<modality>`` in a prompt.
        encoder: who the encoder is, with ``width`` and ``fingerprint``.
        connector: kind and parameters of the connector.
        tags: whether a learned token stands before and after each item's.

    Attributes:
        sentinel: the placeholder's id; set it before plugging where there are several.
    """

    granularity: ClassVar[str] = "model"

    def __init__(
        self, modality: str, encoder: dict[str, Any], connector: dict[str, Any], tags: bool
    ) -> None:
        super().__init__(modality=modality, encoder=encoder, connector=connector, tags=tags)
        self.modality = modality
        self.sentinel = SENTINEL
        self._given: tuple[Tensor, Tensor, list[int]] | None = None

    def build(self, backbone: Backbone) -> Self:
        """Makes the connector for the backbone's width.

        Raises:
            UserError: the backbone is no language model that reads from left to right.
        """
        if backbone.family != "decoder" or backbone.model.get_output_embeddings() is None:
            raise UserError(
                f"The backbone '{backbone.id}' is no language model that reads from left to right: "
                "choose one that can go on after an item."
            )
        site = backbone.sites["embed"]
        weight = backbone.model.get_submodule(site.module).weight
        assert isinstance(weight, Tensor)
        scale = float(weight[:4096].float().std())
        width = int(self.hyper["encoder"]["width"])
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.connector = make_connector(self.hyper["connector"])
        self.connector.build(width, site.out_features, scale)
        self.site_names = (site.name, *self.connector.attach(backbone))
        if self.hyper["tags"]:
            self.tags = nn.Parameter(scale * torch.randn(2, site.out_features))
        return self.to(backbone.device)

    def needs(self) -> list[str]:
        """The encoder."""
        return [str(self.hyper["encoder"]["fingerprint"])]

    @torch.no_grad()
    def standardise(self, features: Tensor) -> None:
        """Learns mean and deviation of each feature from vectors ``[vectors, d_v]``."""
        mean: Tensor = self.get_buffer("mean")
        deviation: Tensor = self.get_buffer("deviation")
        values = features.double()
        mean.copy_(values.mean(dim=0))
        spread = values.std(dim=0, correction=0)
        typical = spread.mean() if float(spread.mean()) > 0 else torch.ones_like(spread[0])
        # A feature that never moved tells nothing; dividing by its noise would make it loud, and
        # most so where it moves for the first time: a word never met, a value never missing before.
        deviation.copy_(torch.where(spread < 1e-3 * typical, typical, spread))

    def count(self, n: int) -> int:
        """How many tokens an item of n feature vectors becomes, its tags included."""
        return self.connector.count(n) + (2 if self.hyper["tags"] else 0)

    def take(self, batch: Mapping[str, Any]) -> None:
        """Notes the features of a batch's items.

        Args:
            batch: ``<modality>/features`` ``[items, n, d_v]``, ``<modality>/mask`` bool
                ``[items, n]`` and ``<modality>/items``, how many each row has, int64 ``[rows]``;
                absent where the batch has none.
        """
        key = f"{self.modality}/"
        if f"{key}features" not in batch:
            self._given = None
            return
        counts = batch[f"{key}items"].tolist()
        self._given = (batch[f"{key}features"], batch[f"{key}mask"], counts)

    def tokens_of(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of some items, and which of them are there, see `Connector.forward`.

        Args:
            features: ``[items, n, d_v]`` as the encoder gave them.
            mask: bool ``[items, n]``.
        """
        device = self.get_buffer("mean").device
        values = features.to(device, torch.float32) - self.get_buffer("mean")
        mask = mask.to(device)
        values = (values / self.get_buffer("deviation")).masked_fill(~mask[..., None], 0)
        tokens, there = self.connector(values, mask)
        if not self.hyper["tags"]:
            return tokens, there
        begin, end = (tag.expand(len(tokens), 1, -1) for tag in self.tags)
        # The end tag comes right behind the item's last token: the order of the mask's true places.
        held = torch.ones(len(tokens), 1, dtype=torch.bool, device=there.device)
        return torch.cat([begin, tokens, end], 1), torch.cat([held, there, held], 1)

    def read(self) -> tuple[Tensor, list[int]]:
        """The tokens of the batch that was taken, see `plugs.Tokens`."""
        if self._given is None:
            return self.get_buffer("mean").new_zeros(0, 1), []
        features, mask, items = self._given
        tokens, there = self.tokens_of(features, mask)
        sizes = there.sum(dim=1).tolist()
        counts, at = [], 0
        for count in items:
            counts.append(int(sum(sizes[at : at + count])))
            at += count
        return tokens[there], counts

    def _watch(self, here: Tensor | None, past: int) -> None:
        """Tells the connector of a pass that begins."""
        items = [] if self._given is None else self._given[2]
        self.connector.look(here, past, items, 2 if self.hyper["tags"] else 0)

    def plugs(self) -> Iterable[Plug]:
        """One plug in place of the placeholders, and what the connector has elsewhere."""
        yield Tokens(self.site_names[0], self.sentinel, self.read, self._watch)
        yield from self.connector.plugs()
