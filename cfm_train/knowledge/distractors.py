"""Distractor mixing: other bricks beside the one that is trained, so that they compose later.

Cartridges trained alone fall apart when several are plugged in, for each has only ever been all
that there is to attend to. With others beside it in training, drawn anew in each micro-batch, it
learns to be one of many (CAS 2026, arXiv 2606.04557). Low-rank updates add up where they meet, and
one that was trained in the other's company makes up for what the other does. The others are frozen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cfm_train.bricks.brick import Brick


class Distractors:
    """Draws which other bricks are plugged in, and in which order.

    Args:
        bricks: the others, finished.
    """

    def __init__(self, bricks: Sequence[Brick]) -> None:
        self.bricks = list(bricks)

    def around(self, brick: Brick) -> list[Brick]:
        """The brick among some of the others: any number of them, in any order.

        The draw follows torch's generator, which is set anew for every micro-batch.
        """
        count = int(torch.randint(len(self.bricks) + 1, ()))
        chosen = torch.randperm(len(self.bricks))[:count].tolist()
        at = int(torch.randint(count + 1, ()))
        others = [self.bricks[number] for number in chosen]
        return [*others[:at], brick, *others[at:]]
