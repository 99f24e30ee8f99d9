"""What a mode promises, tried on the bricks of a run, and how much the order of the bricks matters.

Figures are relative: a difference of answers divided by the largest answer, and the order effect

    max |out(a, b, …) − out(…, b, a)| / max |out(a, b, …) − out(bare)|

by what the stitch changes at all. Answers are logits where the backbone has a language model head,
hidden states else, on the real tokens of a probe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from cfm_train.backbone.plugs import In, Out, Plug
from cfm_train.bricks.bank import LowRank
from cfm_train.bricks.brick import Brick
from cfm_train.stitching.ports import VIRTUAL, Place, Port
from cfm_train.stitching.stitch import Stitch, part_places, stitch_bricks

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone

#: Rounding that layers above carry on, as a share of the largest answer.
TOLERANCE = {torch.float32: 1e-5}
HALF = 0.1


@dataclasses.dataclass(frozen=True)
class Probe:
    """Tokens on which answers are compared.

    Attributes:
        backbone: the backbone.
        ids: ``[rows, seq]`` int64.
        mask: ``[rows, seq]``, 1 for real tokens.
    """

    backbone: Backbone
    ids: Tensor
    mask: Tensor

    @property
    def tokens(self) -> int:
        """How many real tokens there are."""
        return int(self.mask.sum())

    @torch.inference_mode()
    def ask(self, *bricks: Brick) -> Tensor:
        """Answers ``[tokens, features]`` float32 with these bricks plugged in and no others."""
        backbone = self.backbone
        ids, mask = self.ids.to(backbone.device), self.mask.to(backbone.device)
        with backbone.slots.plugged(bricks):
            if backbone.model.get_output_embeddings() is None:
                found = backbone.hidden_states(ids, mask)
            else:
                more = {"decoder_input_ids": ids} if backbone.family == "encoder-decoder" else {}
                found = backbone.logits(input_ids=ids, attention_mask=mask, **more)
        return found[mask.bool()].float().clone()


def random_probe(backbone: Backbone) -> Probe:
    """Two rows of twelve random tokens, the same each time."""
    size = backbone.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(size, (2, 12), generator=torch.Generator().manual_seed(0))
    return Probe(backbone, ids, torch.ones_like(ids))


def backwards(stitched: Stitch, backbone: Backbone) -> Stitch:
    """The same bricks in the opposite order."""
    parts: list[Any] = list(stitched.parts)
    return stitch_bricks(stitched.mode.name, parts[::-1], backbone)


def order_effect(stitched: Stitch, probe: Probe) -> dict[str, float | int]:
    """How much the opposite order would change, by what the stitch changes, as a record's figure.

    It is a maximum over the probe's tokens, so its interval has no width; n counts the tokens.
    """
    forth, back = probe.ask(stitched), probe.ask(backwards(stitched, probe.backbone))
    effect = (forth - probe.ask()).abs().max().item()
    value = (forth - back).abs().max().item() / effect if effect else 0.0
    return {"value": value, "low": value, "high": value, "n": probe.tokens}


def promises(stitched: Stitch, probe: Probe) -> dict[str, dict[str, Any]]:
    """What the mode promises, as checks for the record.

    Args:
        stitched: the stitch.
        probe: where it is tried.
    """
    mode, backbone = stitched.mode, probe.backbone
    parts: list[Any] = list(stitched.parts)
    alone = [probe.ask(part) for part in parts]
    tolerance = TOLERANCE.get(backbone.dtype, HALF)
    checks: dict[str, dict[str, Any]] = {}

    def promise(sentence: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        worst = max((relative(found, expected) for found, expected in pairs), default=0.0)
        checks[sentence] = {"value": worst, "tolerance": tolerance, "passed": worst <= tolerance}

    def stitch(*bricks: Brick) -> Tensor:
        return probe.ask(stitch_bricks(mode.name, bricks, backbone))

    promise(
        "one brick stitched alone is that brick",
        [(stitch(part), out) for part, out in zip(parts, alone, strict=True)],
    )
    if not mode.ordered:
        promise(
            "the order of the bricks does not matter",
            [(probe.ask(backwards(stitched, backbone)), probe.ask(stitched))],
        )
    still = [(part, Null(part), out) for part, out in zip(parts, alone, strict=True) if quiet(part)]
    if mode.tokens:
        total = stitched.virtual_tokens()
        lengths = [stitch_bricks(mode.name, [part], backbone).virtual_tokens() for part in parts]
        checks["as many virtual tokens as the bricks have together"] = {
            "value": total,
            "tolerance": None,
            "passed": total == sum(lengths),
        }
    elif mode.everywhere:
        bare = probe.ask()
        promise(
            "a pipe that ends in nothing is the bare backbone",
            [(stitch(part, null), bare) for part, null, _ in still],
        )
    else:
        promise(
            "a brick that does nothing leaves the other as it is",
            [
                (found, out)
                for part, null, out in still
                for found in (stitch(part, null), stitch(null, part))
            ],
        )
    return checks


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest expected answer."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def quiet(brick: Brick) -> bool:
    """Whether there is a brick like this one that does nothing."""
    return all(place.port not in (*VIRTUAL, Port.ALONE) for place in part_places(brick))


class Null(Stitch):
    """A brick that acts where another one does, and does nothing there.

    Args:
        like: the other brick.
    """

    def __init__(self, like: Brick) -> None:
        super().__init__("sum")
        self.like = [like]  # in a list: no submodule
        self.places: tuple[Place, ...] = part_places(like)
        self.site_names = like.site_names

    def build(self, backbone: Backbone) -> Self:
        """Nothing to make."""
        return self

    def plugs(self) -> Iterable[Plug]:
        """The other brick's plugs, each with no effect."""
        for plug in self.like[0].plugs():
            if isinstance(plug, LowRank):
                zero = torch.zeros_like
                yield dataclasses.replace(
                    plug, A=zero(plug.A), B=zero(plug.B), magnitude=None, bias=None
                )
            elif isinstance(plug, In):
                yield In(plug.site, lambda call: call.x)
            else:
                assert isinstance(plug, Out)
                yield Out(plug.site, _same_output)


def _same_output(call: Any) -> Tensor:
    assert call.y is not None
    found: Tensor = call.y
    return found


__all__: Sequence[str] = [
    "Null", "Probe", "backwards", "order_effect", "promises", "quiet", "random_probe", "relative",
]  # fmt: skip
