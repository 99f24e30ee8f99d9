"""How alike the updates of bricks are: cosines, and how often their signs disagree.

    cosine           <ΔW₁, ΔW₂> / (‖ΔW₁‖ ‖ΔW₂‖)
    sign conflict    share of opposite signs among entries where both updates are not 0
    weighted         the same with each entry counted by |ΔW₁ ΔW₂|

A low-rank update ΔW = s B A is never formed for the cosine:

    <s₁ B₁ A₁, s₂ B₂ A₂> = s₁ s₂ tr((A₂ A₁ᵀ)(B₁ᵀ B₂))

Signs are those of single entries, so ΔW is formed for them, some rows at a time, in float64. Other
kinds are compared by their parameters, less the value with which a parameter does nothing; only
bricks of one kind, with the same shapes, can be. Conflicting signs are what TIES (Yadav et al.
2023, arXiv 2306.01708) elects between.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cfm_train.bricks.brick import Brick, parameter_name
from cfm_train.bricks.lora import LoRA
from cfm_train.bricks.peft_modules import overlap

Json = dict[str, Any]

#: Entries of an update that are formed at once, 8 bytes each.
CHUNK = 2**20

_LAYER = re.compile(r"(?:^|[.-])((?:encoder|decoder)[.-])?layer[.-](\d+(?:\+\d+)?)(?:[.-]|$)")


@dataclass
class Sums:
    """What cosines and conflicts of all pairs come from, float64 [bricks, bricks] each.

    Attributes:
        dot: inner products.
        both: entries where both are not 0.
        opposite: those of them with opposite signs.
        weight: sums of |a b|.
    """

    dot: Tensor
    both: Tensor
    opposite: Tensor
    weight: Tensor

    @classmethod
    def zeros(cls, count: int) -> Sums:
        """Nothing seen yet."""
        return cls(*(torch.zeros(count, count, dtype=torch.float64) for _ in range(4)))

    def add(self, other: Sums) -> None:
        """Takes in what another part of the bricks gave."""
        for name in ("dot", "both", "opposite", "weight"):
            getattr(self, name).add_(getattr(other, name))

    def pair(self, i: int, j: int) -> dict[str, float | None]:
        """The figures of one pair; None where an update is 0, or no entry is shared."""
        norms = float((self.dot[i, i] * self.dot[j, j]).sqrt())
        dot, both, weight = (float(t[i, j]) for t in (self.dot, self.both, self.weight))
        cosine = max(-1.0, min(1.0, dot / norms)) if norms > 0 else None
        return {
            "cosine": cosine,
            "sign_conflict": float(self.opposite[i, j]) / both if both else None,
            # |ab| − ab is 2|ab| where the signs differ and 0 elsewhere.
            "weighted_conflict": min(1.0, max(0.0, (weight - dot) / (2 * weight)))
            if weight > 0
            else None,
        }


def similarity(bricks: Mapping[str, Brick]) -> Json:
    """Cosine and sign conflict of every pair of bricks, over all sites and by layer.

    Args:
        bricks: the bricks by label.

    Returns:
        ``labels``; ``pairs``: for each ``a``, ``b``, ``of`` (``updates`` or ``parameters``; None
        where they cannot be compared, with the ``reason``), ``cosine``, ``sign_conflict``,
        ``weighted_conflict``, and the same three for each of ``layers``.
    """
    labels = list(bricks)
    pairs: dict[tuple[int, int], Json] = {}
    for i, j in itertools.combinations(range(len(labels)), 2):
        reason = why_not(bricks[labels[i]], bricks[labels[j]])
        pairs[i, j] = {"a": labels[i], "b": labels[j], "of": None, "reason": reason}
        pairs[i, j] |= {"cosine": None, "sign_conflict": None, "weighted_conflict": None}
        pairs[i, j]["layers"] = []
    for group in _groups(bricks):
        chosen = [bricks[label] for label in group]
        low_rank = all(isinstance(brick, LoRA) for brick in chosen)
        total, layers = Sums.zeros(len(group)), dict[str, Sums]()
        for layer, sums in _low_rank(chosen) if low_rank else _parameters(chosen):  # type: ignore[arg-type]
            total.add(sums)
            layers.setdefault(layer, Sums.zeros(len(group))).add(sums)
        for (p, a), (q, b) in itertools.combinations(enumerate(group), 2):
            entry = pairs[labels.index(a), labels.index(b)]
            if entry["reason"] is None:
                entry |= {"of": "updates" if low_rank else "parameters", **total.pair(p, q)}
                entry["layers"] = [
                    {"layer": layer, **layers[layer].pair(p, q)} for layer in layers if layer
                ]
    return {"labels": labels, "pairs": list(pairs.values())}


def why_not(one: Brick, other: Brick) -> str | None:
    """Why two bricks cannot be compared entry by entry; None where they can."""
    for brick in (one, other):
        if not isinstance(brick, Brick) or not brick.tensors():
            return "one of them has no parameters"
        if isinstance(brick, LoRA) and len(brick.magnitude):
            return "DoRA's update is no low-rank sum"
    if isinstance(one, LoRA) and isinstance(other, LoRA):
        for a, b in itertools.product(one.built_for.values(), other.built_for.values()):
            if a.name != b.name and overlap(a, b):
                return f"{a.name} and {b.name} are different parts of one module"
        return None
    if one.kind != other.kind:
        return f"they are of the kinds {one.kind} and {other.kind}"
    a_shapes, b_shapes = ({n: t.shape for n, t in x.tensors().items()} for x in (one, other))
    return None if a_shapes == b_shapes else "their parameters differ in sites or shapes"


def _groups(bricks: Mapping[str, Brick]) -> Iterator[list[str]]:
    """Labels of bricks that are computed together."""
    groups: dict[Any, list[str]] = {}
    for label, brick in bricks.items():
        if why_not(brick, brick) is not None:
            continue
        shapes = tuple(sorted((n, tuple(t.shape)) for n, t in brick.tensors().items()))
        key = "low rank" if isinstance(brick, LoRA) else (brick.kind, shapes)
        groups.setdefault(key, []).append(label)
    yield from groups.values()


def _low_rank(bricks: Sequence[LoRA]) -> Iterator[tuple[str, Sums]]:
    """Layer and sums of each site; a brick that lacks the site adds 0 there."""
    for name in dict.fromkeys(site for brick in bricks for site in brick.scales):
        key, sums = parameter_name(name), Sums.zeros(len(bricks))
        factors = {
            at: (
                brick.lora_A[key].detach().double(),
                brick.lora_B[key].detach().double() * brick.scales[name],
            )
            for at, brick in enumerate(bricks)
            if name in brick.scales
        }
        there = list(factors)
        for i, j in itertools.combinations_with_replacement(there, 2):
            (A, B), (C, D) = factors[i], factors[j]
            sums.dot[i, j] = sums.dot[j, i] = ((B.T @ D) * (A @ C.T)).sum().cpu()
        rows, columns = factors[there[0]][1].shape[0], factors[there[0]][0].shape[1]
        step = max(1, CHUNK // columns)
        for start in range(0, rows, step):
            dense = [(B[start : start + step] @ A).flatten() for A, B in factors.values()]
            _count(torch.stack(dense), there, sums)
        yield layer_of(name), sums


def _parameters(bricks: Sequence[Brick]) -> Iterator[tuple[str, Sums]]:
    """Layer and sums of each parameter."""
    tensors = [brick.tensors() for brick in bricks]
    for name in tensors[0]:
        sums = Sums.zeros(len(bricks))
        values = [
            (each[name].detach().double() - getattr(brick, "neutral", 0.0)).flatten()
            for each, brick in zip(tensors, bricks, strict=True)
        ]
        for start in range(0, len(values[0]), CHUNK):
            part = torch.stack([value[start : start + CHUNK] for value in values])
            sums.dot.add_((part @ part.T).cpu())
            _count(part, range(len(bricks)), sums)
        yield layer_of(name), sums


def _count(part: Tensor, there: Sequence[int], sums: Sums) -> None:
    """Adds the signs and sizes of some entries, float64 [bricks, entries]; counts are exact."""
    sign = part.sign()
    agree, both = (sign @ sign.T).cpu(), (sign.abs() @ sign.abs().T).cpu()
    size = (part.abs() @ part.abs().T).cpu()
    index = torch.tensor(list(there))
    place = (index[:, None], index[None, :])
    sums.both[place] += both
    sums.opposite[place] += (both - agree) / 2
    sums.weight[place] += size


def layer_of(name: str) -> str:
    """The layer of a site or a parameter, such as ``layer.3``; empty outside of the layers."""
    found = _LAYER.search(name)
    if found is None:
        return ""
    return f"{(found[1] or '').replace('-', '.')}layer.{found[2]}"
