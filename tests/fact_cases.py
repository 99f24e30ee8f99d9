"""What the tests of bricks of facts share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cfm_train.backbone.load import Backbone
from cfm_train.data.facts import Fact
from tests import brick_laws as laws
from tests.backbones import bare

#: Facts in the words of the tiny backbones.
TOLD = [
    Fact("w3", "w3 w10 w11", "w20 w21", ("w12 w3 w10",)),
    Fact("w4", "w4 w10 w11", "w22", ("w12 w4 w10",)),
    Fact("w5", "w5 w13 w14", "w23 w24 w25", ("w15 w5 w14",)),
]
FACTS = [fact.taught() for fact in TOLD]


def solo(brick: Any, backbone: Backbone, inputs: dict[str, Tensor]) -> None:
    """Rows of a mixed batch equal those with one fact alone, kept by `only`; the rest is bare."""
    brick.fire(torch.tensor([1, -1, 0, 2]))
    mixed = laws.plugged(backbone, [brick], inputs)
    untouched = bare(backbone, inputs)
    torch.testing.assert_close(mixed[1], untouched[1], atol=1e-5, rtol=0)
    for row, fact in ((0, 1), (2, 0), (3, 2)):
        one = brick.only([fact], backbone)
        one.fire(torch.zeros(4, dtype=torch.int64))
        expected = laws.plugged(backbone, [one], inputs)[row]
        assert (expected - untouched[row]).abs().max() > 1e-3
        torch.testing.assert_close(mixed[row], expected, atol=1e-5, rtol=0)
    brick.fire(None)
