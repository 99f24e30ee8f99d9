"""Cartridges: the keys and values of a document's start, trained until they stand for all of it.

    attention(q, [K_1; K_2 … K_p; K], [V_1; V_2 … V_p; V])     K_1, V_1 frozen, the others trained

Eyuboglu et al. 2025, "Cartridges", arXiv 2506.06266. The keys and values are those that the
document's first p tokens leave behind, so a new cartridge is that text, read before the input. The
first token stays as it is: models use it as an attention sink, and training is unsteady where it
moves (the paper's §3; `frozen` says how many).

It is a prefix with another start. On disk it is PEFT's ``CARTRIDGE`` where PEFT can say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from cfm_train.bricks.brick import parameter_name
from cfm_train.bricks.prefix import (
    Prefix,
    States,
    attention_sites,
    length,
    token_states,
)
from cfm_train.bricks.prompt_files import start_ids
from cfm_train.config.types import Count, Positive, Text
from cfm_train.errors import UserError

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


class Cartridge(Prefix):
    """Trained keys and values that begin as those of a text.

    Args:
        tokens: how many virtual tokens.
        init: ``document`` starts from the first tokens of the text that `about` told of, ``text``
            from ``text``, ``vocabulary`` from random tokens.
        text: what is read at first, cut or repeated to the length; None without ``init=text``.
        frozen: how many tokens at the start are never trained; fewer than ``tokens``.
        sites: patterns of attention sites, see `Prefix`.
        layers: numbers of the layers to use, negative ones from the top; None for all.
        positions: where it lies beside others, see `Prefix`.
    """

    def __init__(
        self,
        tokens: Positive,
        init: Literal["document", "text", "vocabulary"],
        text: Text | None,
        frozen: Count,
        sites: list[str],
        layers: list[int] | None,
        positions: Literal["behind", "shared"],
    ) -> None:
        super().__init__(tokens, "text", text, sites, layers, None, positions)
        self.hyper = {
            "tokens": tokens,
            "init": init,
            "text": text,
            "frozen": frozen,
            "sites": sites,
            "layers": layers,
            "positions": positions,
        }
        self.document: Tensor | None = None
        if frozen >= tokens:
            raise UserError(
                f"brick.frozen={frozen} leaves nothing to train of brick.tokens={tokens}: freeze 1."
            )

    def about(self, ids: Tensor) -> Self:
        """Notes the tokens of the document ``[tokens]``."""
        self.document = ids
        return self

    def build(self, backbone: Backbone) -> Self:
        """Makes keys and values for every chosen site from real ones.

        Raises:
            UserError: there is no document to start from, or it is too short.
        """
        hyper = self.hyper
        sites = attention_sites(backbone, hyper["sites"], hyper["layers"])
        if hyper["init"] == "document":
            ids = first_tokens(self.document, hyper["tokens"]).to(backbone.device)
        else:
            ids = start_ids(backbone, hyper["tokens"], hyper["init"], hyper["text"])
        return self.hold(token_states(backbone, ids, [site.name for site in sites]), backbone)

    def keep(self, site: str, keys: Tensor, values: Tensor) -> None:
        """The first ``frozen`` tokens become buffers, the others parameters."""
        frozen = self.hyper["frozen"]
        for what, part in (("keys", keys), ("values", values)):
            self.register_buffer(f"first_{what}_{parameter_name(site)}", part[:frozen].clone())
        super().keep(site, keys[frozen:].clone(), values[frozen:].clone())

    @property
    def computed(self) -> bool:
        """Frozen and trained tokens are put together in each pass."""
        return True

    def states(self, site: str) -> States:
        """Keys and values of a site, the frozen ones first."""
        name = parameter_name(site)
        keys, values = super().states(site)
        return (
            torch.cat([getattr(self, f"first_keys_{name}"), keys]),
            torch.cat([getattr(self, f"first_values_{name}"), values]),
        )

    def format(self) -> dict[str, Any]:
        """PEFT's cartridge."""
        return {"peft_type": "CARTRIDGE", "num_frozen_tokens": self.hyper["frozen"]}

    @classmethod
    def found(cls, states: Mapping[str, States], config: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a cartridge that was not made here."""
        plain = {"tokens": length(states), "init": "vocabulary", "text": None, "layers": None}
        return {**plain, "sites": list(states), "frozen": config.get("num_frozen_tokens", 1)}


def first_tokens(document: Tensor | None, tokens: int | None) -> Tensor:
    """The tokens of a document that a brick begins with.

    Args:
        document: all of them ``[tokens]``; None where nobody told of a document.
        tokens: how many are wanted; None for all.

    Raises:
        UserError: there is no document, or it has fewer tokens.
    """
    if document is None or not len(document):
        raise UserError(
            "This brick starts from a document, and there is none: use recipe=knowledge/cartridge "
            "or recipe=knowledge/prefix with data.documents=FILE, or brick=cartridge "
            "brick.init=vocabulary."
        )
    if tokens is not None and len(document) < tokens:
        raise UserError(
            f"brick.tokens={tokens} is more than the {len(document)} tokens of the documents: "
            f"set brick.tokens={len(document)}."
        )
    return document if tokens is None else document[:tokens]
