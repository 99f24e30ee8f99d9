"""Where the elements of tensors come from: labels, and what else a storage has passed.

A *label* is one output feature of one product with a weight, a number that is unique in the model.
`Flow` keeps the labels of every element of a storage; since a label array can be viewed like the
tensor itself, views need no rule of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

_NONE: frozenset[int] = frozenset()


@dataclass(slots=True)
class Flow:
    """Where the elements of one storage come from.

    Attributes:
        plain: labels that passed no activation function, int32, one for each element of the
            storage; -1 for none.
        active: labels that passed one.
        scores: attention scores in here, by number.
        probabilities: scores that went through a softmax.
        attention: results of attention in here, by number.
        inputs: which token ids it depends on: bit 0 the encoder's, bit 1 the decoder's.
        weight: the parameter that it is a copy of.
    """

    plain: Tensor | None = None
    active: Tensor | None = None
    scores: frozenset[int] = _NONE
    probabilities: frozenset[int] = _NONE
    attention: frozenset[int] = _NONE
    inputs: int = 0
    weight: str | None = None


def key_of(tensor: Tensor) -> int:
    """What tells a tensor's storage from others while it is alive."""
    return tensor.untyped_storage()._cdata


def joined(flows: Iterable[Flow]) -> Flow:
    """What several flows have passed together; labels and weights are left out."""
    total = Flow()
    for flow in flows:
        total.scores |= flow.scores
        total.probabilities |= flow.probabilities
        total.attention |= flow.attention
        total.inputs |= flow.inputs
    return total


def view(labels: Tensor | None, tensor: Tensor) -> Tensor | None:
    """The labels of a tensor, from those of its storage."""
    if labels is None:
        return None
    return labels.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def spread(labels: Tensor, tensor: Tensor, old: Tensor | None) -> Tensor:
    """Labels of a tensor as labels of its storage; elements outside of it keep the ``old`` ones."""
    if old is None:
        count = tensor.untyped_storage().nbytes() // tensor.element_size()
        if tensor.numel() == count and tensor.is_contiguous():
            # A storage of its own: views of it are made by offset.
            return labels.expand(tensor.shape).clone(memory_format=torch.contiguous_format).view(-1)
        flat = torch.full((count,), -1, dtype=torch.int32, device="cpu")
    else:
        flat = old.clone()
    flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).copy_(labels)
    return flat


def first(candidates: Iterable[Tensor | None], shape: torch.Size) -> Tensor | None:
    """Elementwise the first label among those that broadcast to ``shape``."""
    result: Tensor | None = None
    for labels in candidates:
        if labels is None or labels.ndim > len(shape):
            continue
        pairs = zip(reversed(labels.shape), reversed(shape), strict=False)
        if all(width in (1, out) for width, out in pairs):
            labels = labels.expand(shape)
            result = labels if result is None else torch.where(result >= 0, result, labels)
    return result


def run_on_labels(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    labels_of: Callable[[Tensor], Tensor | None],
) -> Tensor | None:
    """Runs an operation that only moves elements on their labels.

    Args:
        func, args, kwargs: the operation as it was called on meta tensors.
        labels_of: the labels of one of its tensors.

    Returns:
        Labels of its output; None if no input has any, or if it moves elements to where the values
        of a meta tensor say.
    """
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    hidden = any(t.device.type == "meta" and not t.is_floating_point() for t in tensors)
    if hidden or not any(labels_of(t) is not None for t in tensors):
        return None

    def replace(tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            return tensor  # an index, with values
        found = labels_of(tensor)
        if found is not None:
            return found
        return torch.full(tensor.shape, -1, dtype=torch.int32, device="cpu")

    moved: Tensor = func(
        *tree_map_only(Tensor, replace, args), **tree_map_only(Tensor, replace, kwargs)
    )
    return moved
