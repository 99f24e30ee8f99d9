"""What brick kinds share that hold many facts: each fact's own parameters, one fact for each row.

Every parameter is a stack ``[facts, …]``. Which fact acts on which row of a batch is decided once a
pass, when the tokens are embedded:

    given      `fire` says it: training and evaluation know the fact, or have asked the gate
    gate       the gate (`fact_gate`) reads the prompt; what is generated behind it keeps its fact
    neither    a brick of one nameless fact acts on all rows, like any other brick

A row without a fact is left alone; where no row has one, the pass is the bare backbone's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from safetensors.torch import load
from torch import Tensor, nn

from cfm_train.backbone.plugs import Call, Out
from cfm_train.backbone.virtual import spread
from cfm_train.bricks.brick import NATIVE_FILE, Brick
from cfm_train.bricks.fact_gate import FactGate, read_gate
from cfm_train.errors import UserError

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone

#: Value of a row on which no fact acts.
NONE = -1
GATE = "gate."


class ByFact:
    """Mixed into a `Brick` whose parameters are stacks over facts.

    Attributes:
        shared: whether facts' parameters are computed by maps that are learned over all of them
            together (`by_vector.py`), else each fact has its own.
        facts: what each fact is, as the card keeps it; empty for a brick of one nameless fact.
        gate: what finds the fact that a prompt asks for; None to act on every row.
        chosen: the fact of each row ``[batch]`` int64 in the pass that runs, `NONE` for none.
    """

    shared: ClassVar[bool] = False

    facts: list[dict[str, Any]]
    gate: FactGate | None
    chosen: Tensor | None

    def begin(self) -> None:
        """Called at the end of ``__init__``: one nameless fact."""
        self.facts, self.gate, self.chosen, self._given = [], None, None, False
        object.__setattr__(self, "_backbone", None)

    def __len__(self) -> int:
        return max(1, len(self.facts))

    def for_facts(self, facts: Sequence[Mapping[str, Any]]) -> Self:
        """Makes room for facts; called before `build`."""
        self.facts = [dict(fact) for fact in facts]
        return self

    def know(self, backbone: Backbone) -> None:
        """Notes the backbone, whose tokenizer turns ids back into the prompt that a gate reads."""
        object.__setattr__(self, "_backbone", backbone)

    def fire(self, facts: Tensor | None) -> None:
        """Says which fact acts on each row ``[batch]`` from now on; None asks the gate."""
        self.chosen, self._given = facts, facts is not None

    def places(self, batch: int) -> Tensor:
        """The fact of each row, ``[batch]`` int64 on the CPU."""
        if self.chosen is None:
            return torch.zeros(batch, dtype=torch.int64)
        return spread(self.chosen, batch)

    def members(self, width: int, batch: int) -> Tensor:
        """Which of ``width`` rows for each fact act on each row of a batch.

        Returns:
            ``[batch, facts * width]`` bool, fact after fact.
        """
        if self.gate is None and self.chosen is None:  # all on every row
            return torch.ones(batch, len(self) * width, dtype=torch.bool)
        own = self.places(batch)[:, None] == torch.arange(len(self))
        return own.repeat_interleave(width, dim=1)

    def room(self, backbone: Backbone) -> Self:
        """Makes the parameters for values that are set right afterwards, whatever they are now.

        A new brick has them; kinds that read texts to start from know a quicker way.
        """
        return cast(Self, cast(Brick, self).build(backbone))

    def watch(self) -> Out:
        """The plug that decides, at the embedding of token ids; it changes nothing."""
        return Out("embed", self._decide)

    def _decide(self, call: Call) -> Tensor:
        assert call.y is not None
        if self._given or self.gate is None:
            return call.y
        ids = call.x
        if ids.dtype.is_floating_point:
            raise UserError(
                "A brick of facts reads the prompt from token ids: give the model input_ids, not "
                "embeddings."
            )
        goes_on = ids.shape[1] == 1 and self.chosen is not None
        if goes_on and ids.shape[0] % len(cast(Tensor, self.chosen)) == 0:
            return call.y  # what is written behind a prompt keeps its fact
        tokenizer = self._backbone.tokenizer  # type: ignore[attr-defined]
        prompts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        self.chosen = torch.tensor(self.gate.find(prompts), dtype=torch.int64)
        return call.y

    def only(self, kept: Sequence[int], backbone: Backbone) -> Self:
        """A new brick with some of the facts alone, their tensors to the bit."""
        index = torch.tensor(list(kept), dtype=torch.int64)
        tensors = {
            name: value[index.to(value.device)] if name in self.stacked() else value
            for name, value in cast(Brick, self).tensors().items()
        }
        facts = [self.facts[i] for i in kept]
        made = self.made({**self.interface(), "facts": facts}, tensors, backbone)
        made.gate = None if self.gate is None else self.gate.only(list(kept))
        return made

    def stacked(self) -> set[str]:
        """The tensors that hold one entry for each fact."""
        return set(cast(Brick, self).tensors())

    def expect(self, interface: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Shown what a brick will be made of, before it is built."""

    @classmethod
    def made(
        cls, interface: Mapping[str, Any], tensors: Mapping[str, Tensor], backbone: Backbone
    ) -> Self:
        """A brick of an interface and its own tensors, without a gate."""
        brick: Any = cls(**interface["hyper"])
        brick.for_facts(interface.get("facts", []))
        brick.expect(interface, tensors)
        brick.room(backbone)
        brick.load_tensors(tensors)
        return cast(Self, brick)

    def needs(self) -> list[str]:
        """The fingerprint of the gate's sentence encoder."""
        return [] if self.gate is None else [self.gate.fingerprint]

    def interface(self) -> dict[str, Any]:
        """Kind, sites and the facts with their gate's words."""
        found = super().interface()  # type: ignore[misc]
        if self.facts:
            found["facts"] = self.facts
            found["gate"] = None if self.gate is None else self.gate.described()
        return cast(dict[str, Any], found)

    def body_files(self) -> dict[str, bytes]:
        """``brick.safetensors``, with the gate's tensors under ``gate.``."""
        from safetensors.torch import save

        own = cast(Brick, self)
        tensors = {name: value.contiguous().cpu() for name, value in own.tensors().items()}
        if self.gate is not None:
            tensors |= {GATE + name: value for name, value in self.gate.tensors().items()}
        return {NATIVE_FILE: save(tensors)}

    @classmethod
    def restore(
        cls, interface: Mapping[str, Any], files: Mapping[str, bytes], backbone: Backbone
    ) -> Self:
        """A brick from what `interface` and `body_files` gave.

        Raises:
            UserError: it holds facts and the backbone is no language model, or see `Brick.restore`.
        """
        if interface.get("facts") and backbone.family != "decoder":
            raise UserError(
                f"A brick of facts goes with a language model, and '{backbone.id}' is none "
                f"({backbone.family}); its gate's encoder is opened by itself."
            )
        tensors = load(files[NATIVE_FILE])
        gate = {n.removeprefix(GATE): tensors.pop(n) for n in list(tensors) if n.startswith(GATE)}
        brick = cls.made(interface, tensors, backbone)
        if interface.get("gate") is not None:
            brick.gate = read_gate(interface["gate"], brick.facts, gate)
        return brick


def row_mask(facts: Tensor, like: Tensor) -> Tensor:
    """Where rows have a fact, shaped to go with ``like``."""
    there = (facts >= 0).to(like.device)
    return there.reshape(-1, *[1] * (like.ndim - 1))


def stack(*shape: int) -> nn.Parameter:
    """A parameter of zeros, float32."""
    return nn.Parameter(torch.zeros(*shape))
