"""The contract of a merge rule: how several updates of the same place become one.

A rule is one file in this folder with one subclass of `Rule`; its name is the file's name and its
defaults stand in ``conf/rule/``. It is a pure function on tensors: which tensors those are
(`spaces`), how many of them are taken at once (`scope`), what was dropped from them before
(`sparsify`) and which weights they have are choices of their own, see `mix.Mix`.

An *update* is the difference to what the backbone has there; for the parameters of a brick it is
the difference to the values that change nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cfm_train.errors import UserError

#: What a rule may promise; `invariants.py` tries each on the bricks of the run.
PROMISES = {
    "identity": "weight 1 on one brick is that brick",
    "permutation": "the order of the bricks does not matter",
    "cancel": "w and -w of one brick cancel",
    "idempotent": "merging a brick with itself is that brick",
    "off": "scale 0 is the bare backbone",
}


@dataclass(frozen=True)
class Facts:
    """What a rule may know besides the updates.

    Attributes:
        name: the entry or group of entries, for error sentences.
        statistics: one tensor for each input, where the rule `needs` them (Fisher: of the update's
            shape; Gram: ``[in, in]``), float32 or float64.
    """

    name: str
    statistics: Sequence[Tensor] = ()


class Rule(ABC):
    """Base class of all merge rules.

    Attributes:
        kind: the rule's name, that of its file.
        linear: whether the result is the sum of weight times update, whatever the updates are: such
            a rule never needs low-rank updates multiplied out.
        weightless: whether it takes no weights.
        elementwise: whether a number of the result depends on the same place of the inputs alone.
        matrices: whether it needs whole matrices ``[out, in]``; vectors go to `combine_vectors`.
        fewest, most: how many inputs it takes.
        needs: the statistics it needs, ``fisher`` or ``gram``; None for none.
        needs_base: whether it means differences to a base, so that whole models cannot be merged
            without one; the others take parameters as well.
        ranks: whether it keeps the largest singular values of a matrix.
        multiplies: whether twice the weights give twice the result; no rule that averages does.
        promises: names from `PROMISES` that hold for it when nothing is sparsified.

    The last two may depend on a rule's arguments.
    """

    kind: ClassVar[str]
    linear: ClassVar[bool] = False
    weightless: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False
    matrices: ClassVar[bool] = False
    fewest: ClassVar[int] = 1
    most: ClassVar[int | None] = None
    needs: ClassVar[str | None] = None
    needs_base: ClassVar[bool] = True
    ranks: ClassVar[bool] = False
    multiplies: bool = False
    promises: frozenset[str] = frozenset()

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = cls.__module__.rsplit(".", 1)[-1]

    @abstractmethod
    def combine(self, updates: Tensor, weights: Tensor, facts: Facts) -> Tensor:
        """One update from several.

        Args:
            updates: ``[N, *shape]``, float32 or float64.
            weights: ``[N]``, or of the updates' shape where weights differ within a group (only an
                `elementwise` rule is given such); the same dtype.
            facts: name and statistics.

        Returns:
            ``[*shape]`` in the updates' dtype.

        Raises:
            UserError: the inputs cannot be merged this way.
        """

    def combine_vectors(self, updates: Tensor, weights: Tensor) -> Tensor:
        """What is done with vectors by a rule for `matrices`: their weighted mean, ``[*shape]``.

        Raises:
            UserError: the weights add up to zero.
        """
        return weighted_sum(updates, shares(weights, self.kind))


def weighted_sum(updates: Tensor, weights: Tensor) -> Tensor:
    """``Σ wᵢ τᵢ`` over the first dimension, ``[*shape]``.

    Added up in order, so that no number depends on how many others are summed beside it.
    """
    if weights.ndim > 1:
        return (updates * weights).sum(0)
    total = updates[0] * weights[0]
    for update, weight in zip(updates[1:], weights[1:].tolist(), strict=True):
        total.add_(update, alpha=weight)
    return total


def shares(weights: Tensor, rule: str) -> Tensor:
    """Weights ``[N]`` divided by their sum, for rules that average.

    Raises:
        UserError: they add up to zero.
    """
    total = weights.sum(0)
    if bool((total.abs() < 1e-8 * weights.abs().sum(0).clamp(min=1e-300)).any()):
        raise UserError(
            f"rule={rule} averages, and these weights add up to zero: give others, or use "
            "rule=linear."
        )
    return weights / total


def per_input(weights: Tensor, like: Tensor) -> Tensor:
    """Weights ``[N]`` or ``[N, *shape]``, shaped to multiply ``like`` ``[N, *shape]``."""
    return weights.reshape(weights.shape + (1,) * (like.ndim - weights.ndim))
