"""Where the threshold of a gate lies: between how facts are asked for and what else is asked.

    asked for     a fact's taught prompt against its other taught prompts, itself left out
    else          what is asked in other facts' prompts, about this fact's subject

Both are known from what is taught alone. Facts that share a way of asking are of one relation and
are no examples of something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cfm_train.bricks.fact_gate import Encoder, FactGate, without
from cfm_train.data.facts import Fact

#: The threshold where nothing tells: one fact with one prompt.
UNKNOWN = 0.8
#: Most prompts of something else that a fact is held against; of more, so many evenly taken.
MOST = 256


@dataclass(frozen=True)
class Calibrated:
    """A gate, and what it does with what was taught.

    Attributes:
        gate: the gate.
        hits: one value for each prompt that has others: 1 where it finds its fact by them.
        false_fires: one value for each prompt of something else: 1 where the fact fires.
    """

    gate: FactGate
    hits: list[float]
    false_fires: list[float]


def calibrate(
    facts: Sequence[Fact],
    encoder: Encoder,
    *,
    false_fires: float,
    threshold: float | None,
    tick: Callable[[int], Any] | None = None,
) -> Calibrated:
    """Makes the gate of facts.

    Args:
        facts: the facts in the brick's order.
        encoder: the sentence encoder.
        false_fires: the share of prompts of something else that may fire.
        threshold: the least cosine where it is given; None to find it.
        tick: told how many texts have just been encoded.
    """
    cuts = [[without(p, fact.subject, encoder.blank) for p in fact.prompts] for fact in facts]
    flat = [cut for one in cuts for cut in one]
    vectors = encoder.encode(flat, tick)
    owner = torch.tensor([at for at, one in enumerate(cuts) for _ in one], dtype=torch.int64)
    words = sorted(set(flat))
    table = encoder.encode(words)
    near = table @ table.T
    place = {word: at for at, word in enumerate(words)}
    relation = np.array(_relations(cuts))[owner.numpy()]  # [prompts]
    places = np.array([place[cut] for cut in flat])
    asked, other = [], []
    for at, one in enumerate(cuts):
        own = sorted({place[cut] for cut in one})
        for word in own:
            rest = [w for w in own if w != word]
            if rest:
                asked.append(float(near[word, rest].max()))
        strange = np.unique(places[relation != relation[owner.tolist().index(at)]])
        strange = strange[:: -(-len(strange) // MOST) or 1]
        other += near[strange][:, own].amax(1).tolist()
    found = _threshold(asked, other, false_fires) if threshold is None else threshold
    gate = FactGate(
        [fact.taught() for fact in facts],
        vectors,
        owner,
        torch.tensor(found),
        encoder.section,
        encoder.fingerprint,
        encoder,
    )
    return Calibrated(gate, [float(a >= found) for a in asked], [float(o >= found) for o in other])


def _relations(cuts: Sequence[Sequence[str]]) -> list[int]:
    """A number for each fact; facts that share a way of asking, in one or more steps, have one."""
    number = list(range(len(cuts)))

    def root(at: int) -> int:
        while number[at] != at:
            at = number[at]
        return at

    first: dict[str, int] = {}
    for at, one in enumerate(cuts):
        for cut in one:
            number[root(at)] = root(first.setdefault(cut, at))
    return [root(at) for at in range(len(cuts))]


def _threshold(asked: Sequence[float], other: Sequence[float], false_fires: float) -> float:
    """The least cosine at which no more fire than allowed; higher where that costs no hits."""
    low = torch.tensor(asked, dtype=torch.float64).quantile(0.05).item() if asked else UNKNOWN
    if not other:
        return low
    allowed = torch.tensor(other, dtype=torch.float64).quantile(1 - false_fires).item() + 1e-6
    return (allowed + low) / 2 if allowed < low else allowed
