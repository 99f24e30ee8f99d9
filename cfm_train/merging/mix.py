"""A merge: sparsify × combine × space × scope × weights, chosen one by one.

    updates ─► sparsify ─► rule (weights) ─► λ ─► result

`Mix` holds the choices; `Mix.merge_updates` is the arithmetic on one group of tensors, the same for
bricks (`engine.py`) and for whole models; scopes decide which tensors make a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cfm_train.config import merging as schema
from cfm_train.config.signature import class_of
from cfm_train.errors import UserError
from cfm_train.merging.rule import Facts, Rule
from cfm_train.merging.sparsify.sparsifier import Sparsifier, generator
from cfm_train.merging.weights import Weights, check_filters, check_weights


@dataclass(frozen=True)
class Mix:
    """The choices of a merge.

    Attributes:
        rule: how updates are combined.
        sparsifier: what is dropped of each before.
        space: ``auto``, or the name of a space.
        scope: ``tensor``, ``layer`` or ``brick``: what a rule and a sparsifier see at once.
        rank: the rank of a low-rank result; None for the sum of the parents'.
        fold: ``sqrt`` or ``b``, see `spaces.parameters`.
        scale: λ.
        equal: what inputs without weights weigh, ``mean`` (1/N each) or ``one``; None for a rule
            that takes no weights.
        normalize: whether weights are divided by their sum.
        filters: weights by site, as given.
        seed: for sparsifiers that draw.
    """

    rule: Rule
    sparsifier: Sparsifier
    space: str
    scope: str
    rank: int | None
    fold: str
    scale: float
    equal: str | None
    normalize: bool
    filters: Sequence[Any] | None
    seed: int

    @property
    def adds_up(self) -> bool:
        """Whether the merge is a plain weighted sum of updates."""
        return self.rule.linear and self.sparsifier.kind == "none"

    def weights(
        self, given: object, count: int, layers: Mapping[str, int], what: str = "bricks"
    ) -> Weights:
        """The weights of ``count`` inputs.

        Args:
            given: as a person gave them; None for the rule's own.
            count: number of inputs.
            layers: number of layers of each stack.
            what: what the inputs are, for error sentences.

        Raises:
            UserError: they are no weights, or the rule takes no such number of inputs, or none.
        """
        schema.check_count(self.rule.kind, count, what)
        weights = schema.default_weights(given, count, self.equal, self.rule.kind)
        filters = check_filters(self.filters, count)
        return Weights(check_weights(weights, count), filters, layers, self.normalize)

    def factor_weights(
        self, weights: Sequence[float], part: str, scales: Sequence[float]
    ) -> list[float]:
        """The weights of one factor of low-rank updates: with ``sqrt`` the roots of weight times
        scale on both sides, which multiply to the whole.

        A rule that averages does not multiply by its weights, so it is given them as they are, and
        the scales lie in the factors (`engine`).
        """
        if self.fold != "sqrt" or part not in ("A", "B") or not self.rule.multiplies:
            return list(weights)
        whole = [w * s for w, s in zip(weights, scales or [1.0] * len(weights), strict=True)]
        return [math.copysign(abs(w) ** 0.5, w if part == "A" else 1.0) for w in whole]

    def merge_updates(
        self,
        updates: Tensor,
        weights: Tensor,
        name: str,
        sources: Sequence[str],
        statistics: Sequence[Tensor] = (),
    ) -> Tensor:
        """One update from several; λ is not applied yet.

        Args:
            updates: ``[N, *shape]``, float32 or float64; never written to.
            weights: ``[N]``, or of the updates' shape.
            name: of the tensor or group: what is drawn depends on it.
            sources: what each input is (name and version).
            statistics: one for each input where the rule needs them; none for a tensor that has
                none, such as a bias.

        Returns:
            ``[*shape]`` in the updates' dtype.
        """
        generators = (
            [generator(self.seed, name, s) for s in sources] if self.sparsifier.random else []
        )
        kept = self.sparsifier.sparsify(updates, generators)
        rule = self.rule
        if (rule.matrices and updates.ndim != 3) or (rule.needs is not None and not statistics):
            return rule.combine_vectors(kept, weights)
        if not rule.elementwise:
            weights = one_each(weights)
        return rule.combine(kept, weights, Facts(name, statistics))

    def groups(self, names: Sequence[tuple[str, str]]) -> Iterator[list[int]]:
        """Which tensors are taken at once.

        Args:
            names: tensor name and site of each.

        Yields:
            Numbers of the tensors of each group, in order.

        Raises:
            UserError: the rule or sparsifier cannot take several tensors at once.
        """
        if self.scope == "tensor":
            yield from ([number] for number in range(len(names)))
            return
        for what, bound in (
            (f"rule={self.rule.kind}", self.rule.matrices or self.rule.needs is not None),
            (f"sparsify={self.sparsifier.kind}", self.sparsifier.rows),
        ):
            if bound:
                raise UserError(f"{what} works on one tensor at a time: use merge.scope=tensor.")
        grouped: dict[str, list[int]] = {}
        for number, (_, site) in enumerate(names):
            grouped.setdefault(group_of(site) if self.scope == "layer" else "", []).append(number)
        yield from grouped.values()


def group_of(site: str) -> str:
    """The layer that a site (or a tensor) belongs to, by its name; the name before it else.

    >>> group_of("encoder.layer.3.attn.q"), group_of("embed")
    ('encoder.layer.3', 'embed')
    """
    parts = site.split(".")
    numbered = [at for at, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) if numbered else parts[0]


def one_each(weights: Tensor) -> Tensor:
    """Weights ``[N]`` for a whole tensor.

    Raises:
        UserError: they differ within the tensor or group.
    """
    if weights.ndim == 1:
        return weights
    flat = weights.reshape(len(weights), -1)
    if not bool((flat == flat[:, :1]).all()):
        raise UserError(
            "These weights differ by layer or site, and the rule takes one weight for each input: "
            "use merge.scope=tensor."
        )
    return flat[:, 0]


def make_mix(parameters: Mapping[str, Any]) -> Mix:
    """The merge that flat parameters describe.

    Args:
        parameters: every parameter, as `cfm_train.config.merging.complete` gives them.
    """
    given = dict(schema.check(parameters))
    rule = _method("merging", given.pop("rule"), Rule, given)
    sparsifier = _method("merging/sparsify", given.pop("sparsify"), Sparsifier, given)
    given["seed"] = given["seed"] or 0
    return Mix(rule=rule, sparsifier=sparsifier, **given)


def _method(room: str, name: str, base: type, given: dict[str, Any]) -> Any:
    """A method of a room with its own arguments taken out of ``given``."""
    arguments = schema.own_arguments(room, name)
    return class_of(room, name, base)(**{key: given.pop(key) for key in arguments})
