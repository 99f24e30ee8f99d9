"""Heads: what turns the backbone's hidden states into a task's answers.

    classification, multilabel, regression     pool over tokens, then one linear map
    token                                      one linear map on every token

A head is a named part of a task brick. It works in float32 whatever the backbone's dtype: it is
small, and its logits decide.

A regression head learns standardised targets, (target - center) / spread, so that a target around
1,000 is learnt as fast as one around 1. ``center`` and ``spread`` are tensors of the head like its
weights: wherever the head goes, it answers in the targets' own unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def pool(hidden_states: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """One vector for each row.

    Args:
        hidden_states: ``[batch, seq, hidden]``.
        attention_mask: ``[batch, seq]``, 1 for real tokens.
        pooling: ``mean`` over real tokens, the ``last`` or the ``first`` real one, or ``none``.

    Returns:
        ``[batch, hidden]`` float32; with ``none`` all tokens, ``[batch, seq, hidden]``.
    """
    if pooling == "none":
        return hidden_states.float()
    if pooling == "mean":
        mask = attention_mask.to(torch.float32)
        total = torch.einsum("bsh,bs->bh", hidden_states.float(), mask)
        return total / mask.sum(dim=1, keepdim=True).clamp_min(1)
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    if pooling == "last":
        index = (attention_mask * positions).argmax(dim=1)
    else:
        index = attention_mask.argmax(dim=1)
    rows = torch.arange(len(hidden_states), device=hidden_states.device)
    return hidden_states[rows, index].float()


class Head(nn.Module):
    """A linear head.

    Args:
        task_type: ``classification``, ``multilabel``, ``regression`` or ``token``.
        labels: the label names in order, None for regression.
        hidden_size: width of the backbone.
        pooling: how tokens become one vector, see `pool`.

    Attributes:
        center, spread: scalar float32 buffers of a regression head, the zero and the unit that it
            learns in; None for the other types.
    """

    center: Tensor | None
    spread: Tensor | None

    def __init__(
        self, task_type: str, labels: list[str] | None, hidden_size: int, pooling: str
    ) -> None:
        super().__init__()
        self.task_type = task_type
        self.labels = labels
        self.pooling = pooling
        size = 1 if labels is None else len(labels)
        self.linear = nn.Linear(hidden_size, size)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        has_unit = task_type == "regression"
        self.register_buffer("center", torch.zeros(()) if has_unit else None)
        self.register_buffer("spread", torch.ones(()) if has_unit else None)

    def take_unit(self, targets: Tensor) -> None:
        """Sets center and spread to mean and (population) standard deviation of training targets.

        Args:
            targets: ``[rows]``, finite. Where all are equal the spread stays 1.
        """
        assert self.center is not None and self.spread is not None
        targets = targets.double()
        self.center.copy_(targets.mean())
        if bool((targets != targets[0]).any()):
            smallest = torch.finfo(torch.float32).tiny
            self.spread.copy_(targets.std(correction=0).clamp_min(smallest))

    def standardise(self, targets: Tensor) -> Tensor:
        """Targets ``[batch]`` in the unit that the head learns in, float32."""
        targets = targets.float()
        if self.center is None or self.spread is None:
            return targets
        return (targets - self.center) / self.spread

    def answer(self, logits: Tensor) -> Tensor:
        """What the linear map gave, in regression brought back to the targets' own unit."""
        if self.center is None or self.spread is None:
            return logits
        return logits * self.spread + self.center

    def raw(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """What the linear map gives, the input of `answer`: the loss is taken of it."""
        return self.linear(pool(hidden_states, attention_mask, self.pooling))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits ``[batch, labels]`` (``[batch, seq, labels]`` for ``token``), float32.

        A regression head gives ``[batch, 1]`` in the targets' own unit.
        """
        return self.answer(self.raw(hidden_states, attention_mask))

    def describe(self) -> dict[str, Any]:
        """What the card keeps of the head."""
        return {
            "task": self.task_type,
            "labels": self.labels,
            "pooling": self.pooling,
            "size": self.linear.out_features,
            "hidden_size": self.linear.in_features,
        }

    @classmethod
    def from_description(cls, described: dict[str, Any]) -> Head:
        """The head, untrained, that `describe` was called on."""
        return cls(
            described["task"], described["labels"], described["hidden_size"], described["pooling"]
        )


class Heads(nn.ModuleDict):
    """Heads by task name, whatever the name is.

    PyTorch forbids dots in the names of modules, and names that a module already has, such as
    ``train``; both are fine names for a task, so a head is kept under an escaped one.
    """

    def __getitem__(self, key: str) -> nn.Module:
        return super().__getitem__(_escaped(key))

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(_escaped(key), module)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(_escaped(key))

    def __contains__(self, key: str) -> bool:
        return super().__contains__(_escaped(key))

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> Any:
        """The names of the tasks."""
        return {_unescaped(key): None for key in self._modules}.keys()

    def items(self) -> Any:
        """Name of the task and head."""
        return {_unescaped(key): module for key, module in self._modules.items()}.items()


def _escaped(task: str) -> str:
    return "of_" + task.replace("%", "%25").replace(".", "%2E")


def _unescaped(key: str) -> str:
    return key.removeprefix("of_").replace("%2E", ".").replace("%25", "%")
