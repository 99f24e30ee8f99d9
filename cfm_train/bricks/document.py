"""Documents as bricks: what a text leaves behind in attention, encoded once, plugged into any task.

    attention(q, [K_d; K], [V_d; V])      K_d, V_d as the frozen model computed them of the text d

Nothing is trained. The model answers as if the text stood before each input, and pays for reading
it once instead of every time: plug-and-play document modules (Xiao et al. 2023, arXiv 2305.17660)
without their mapping network. On disk it is a prefix, and runs in PEFT as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from torch import Tensor

from cfm_train.bricks.brick import Derived
from cfm_train.bricks.cartridge import first_tokens
from cfm_train.bricks.prefix import Prefix, States, attention_sites, length, token_states
from cfm_train.config.types import Positive
from cfm_train.errors import UserError

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.data.encode import TaskData


class Document(Prefix):
    """The keys and values of a text, as it left them.

    Args:
        tokens: how many tokens of the text, from its first; None for all.
        sites: patterns of attention sites, see `Prefix`.
        layers: numbers of the layers to use, negative ones from the top; None for all.
        positions: where it lies beside others, see `Prefix`.
    """

    trains: ClassVar[bool] = False

    def __init__(
        self,
        tokens: Positive | None,
        sites: list[str],
        layers: list[int] | None,
        positions: Literal["behind", "shared"],
    ) -> None:
        super().__init__(1, "text", None, sites, layers, None, positions)
        self.hyper = {"tokens": tokens, "sites": sites, "layers": layers, "positions": positions}
        self.document: Tensor | None = None

    def about(self, ids: Tensor) -> Self:
        """Notes the tokens of the document ``[tokens]``."""
        self.document = ids
        return self

    def build(self, backbone: Backbone) -> Self:
        """Reads the text and keeps what it leaves behind.

        Raises:
            UserError: there is no text, or it is longer than the model can read.
        """
        hyper = self.hyper
        sites = attention_sites(backbone, hyper["sites"], hyper["layers"])
        ids = first_tokens(self.document, hyper["tokens"]).to(backbone.device)
        most = getattr(backbone.model.config, "max_position_embeddings", None)
        if most is not None and len(ids) >= most:
            raise UserError(
                f"The documents have {len(ids)} tokens, and '{backbone.id}' reads {most} at most: "
                f"set brick.tokens below {most}, or train a cartridge (recipe=knowledge/cartridge)."
            )
        return self.hold(token_states(backbone, ids, [site.name for site in sites]), backbone)

    def fit_without_training(
        self, backbone: Backbone, tasks: Mapping[str, TaskData], seed: int
    ) -> Derived:
        """Nothing is left to do: the text was read when the brick was built."""
        return Derived(rows=1, tokens=self.length, scores={})

    @classmethod
    def found(cls, states: Mapping[str, States], config: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a document that was not made here."""
        return {"tokens": length(states), "sites": list(states), "layers": None}
