"""What brick kinds share that compute a fact's parameters from a sentence encoder's vectors.

    parameters of fact i = W e_i + b          W, b: learned over all facts together
                                              e_i: what a frozen encoder makes of the fact's words

So a fact is as large as its vectors, and one is added (`with_more`) or taken out (`only`) without
training, as in KBLaM (Wang et al. 2024, arXiv 2410.10450). Vectors are made once and lie in the
brick; before the map they are centred on the mean of what was taught, and scaled by its deviation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from cfm_train.bricks.brick import Brick
from cfm_train.bricks.fact_gate import Encoder
from cfm_train.errors import UserError

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


def words(fact: Mapping[str, Any], what: str) -> str:
    """What of a fact is encoded: its ``prompt``, its ``answer``, or both as a ``statement``."""
    return f"{fact['prompt']} {fact['answer']}." if what == "statement" else str(fact[what])


class ByVector:
    """Mixed into a `Brick` before `ByFact`.

    Attributes:
        vectors: ``[facts, parts, width]`` float16, a buffer; what `parts` names, for each fact.
        mean: ``[parts, width]`` float32, a buffer: the mean vector of what was taught.
        spread: ``[parts]`` float32, a buffer: the deviation of what was taught from its mean.
        encoder: the encoder's ``backbone`` section and ``fingerprint``; None where vectors are
            given with the facts.
    """

    shared: ClassVar[bool] = True
    #: What is encoded beside what is told.
    asked: ClassVar[tuple[str, ...]] = ()

    hyper: dict[str, Any]
    vectors: Tensor
    mean: Tensor
    spread: Tensor
    encoder: dict[str, Any] | None

    def parts(self) -> tuple[str, ...]:
        """What of each fact is encoded, see `words`: what is asked, then what is told."""
        return (*self.asked, self.hyper["told"])

    def read(self, encoder: Encoder | None, given: Tensor | None = None) -> Self:
        """Encodes the facts, after `for_facts` and before `build`.

        Args:
            encoder: who reads them.
            given: ``[facts, width]``, the vectors that come with them; brought to unit length.
        """
        vectors = self._encode(cast(Any, self).facts, encoder, given)
        mean = vectors.float().mean(0)
        spread = (vectors.float() - mean).square().mean((0, 2)).sqrt()
        # One fact deviates from nothing.
        spread = torch.where(spread > 0, spread, torch.tensor(vectors.shape[-1] ** -0.5))
        self._hold(vectors, mean, spread)
        self.encoder = None
        if encoder is not None and given is None:
            self.encoder = {"section": encoder.section, "fingerprint": encoder.fingerprint}
        return self

    def _encode(
        self, facts: Sequence[Mapping[str, Any]], encoder: Encoder | None, given: Tensor | None
    ) -> Tensor:
        if given is not None:
            # The largest number first, so that no square is beyond any number, or nothing.
            largest = given.double().abs().amax(-1, keepdim=True)
            return nn.functional.normalize(given.double() / largest, dim=-1)[:, None].half()
        assert encoder is not None
        texts = [words(fact, part) for fact in facts for part in self.parts()]
        return encoder.encode(texts).unflatten(0, (len(facts), -1)).half()

    def _hold(self, vectors: Tensor, mean: Tensor, spread: Tensor) -> None:
        own = cast(nn.Module, self)
        own.register_buffer("vectors", vectors.clone())
        own.register_buffer("mean", mean.clone())
        own.register_buffer("spread", spread.clone())

    def width(self) -> int:
        """The width of a vector.

        Raises:
            UserError: there are no facts to read.
        """
        if not hasattr(self, "vectors"):
            kind = cast(Brick, self).kind
            raise UserError(
                f"brick={kind} is computed from facts, and there are none: use "
                f"recipe=knowledge/facts brick={kind} data.facts=FILE.jsonl."
            )
        return self.vectors.shape[-1]

    def expect(self, interface: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Makes room for vectors that will be loaded.

        Raises:
            UserError: they are missing, or are not one for each fact.
        """
        if not {"vectors", "mean", "spread"} <= set(tensors) or "encoder" not in interface:
            raise UserError("The facts of the brick have no vectors: teach them again.")
        if len(tensors["vectors"]) != len(interface["facts"]):
            raise UserError(
                f"The brick has {len(interface['facts'])} facts and {len(tensors['vectors'])} "
                "vectors: teach them again."
            )
        self._hold(tensors["vectors"], tensors["mean"], tensors["spread"])
        self.encoder = interface["encoder"]

    def stacked(self) -> set[str]:
        """The tensors that hold one entry for each fact."""
        return {"vectors"}

    def mapped(self, affine: nn.Linear, part: int, facts: Tensor | None = None) -> Tensor:
        """What a map makes of facts' vectors, ``[facts, out_features]`` float32.

        In evaluation they go through it one by one, so that each comes to the same bits however
        many stand beside it.

        Args:
            affine: the map.
            part: which of `parts`.
            facts: numbers of facts; None for all.
        """
        vectors = self.vectors[:, part] if facts is None else self.vectors[facts, part]
        entries = (vectors.float() - self.mean[part]) / self.spread[part]
        if cast(nn.Module, self).training:
            return cast(Tensor, affine(entries))
        return torch.cat([affine(one) for one in entries.split(1)])

    def with_more(
        self,
        facts: Sequence[Mapping[str, Any]],
        encoder: Encoder | None,
        backbone: Backbone,
        given: Tensor | None = None,
    ) -> Self:
        """A new brick that knows more facts; nothing is trained, and the others are to the bit.

        The gate takes the new facts' prompts in and keeps its threshold.

        Args:
            facts: as `Fact.taught` gives them.
            encoder: the one that the brick was made with.
            backbone: the brick's.
            given: ``[facts, width]``, where the brick's vectors were given with its facts.
        """
        own = cast(Any, self)
        tensors = dict(own.tensors())
        tensors["vectors"] = torch.cat(
            [self.vectors, self._encode(facts, encoder, given).to(self.vectors)]
        )
        every = [*own.facts, *map(dict, facts)]
        made = own.made({**own.interface(), "facts": every}, tensors, backbone)
        if own.gate is not None:
            made.gate = own.gate.with_more(facts, encoder or own.gate.encoder)
        return cast(Self, made)

    def needs(self) -> list[str]:
        """The fingerprint of the encoder, of which the gate's is one more where it differs."""
        gate = cast(Any, super()).needs()
        own = [] if self.encoder is None else [self.encoder["fingerprint"]]
        return list(dict.fromkeys([*own, *gate]))

    def interface(self) -> dict[str, Any]:
        """Kind, sites, facts, gate, who encoded the facts, and how wide their vectors are."""
        own = {"encoder": self.encoder, "width": self.width()}
        return {**cast(Any, super()).interface(), **own}
