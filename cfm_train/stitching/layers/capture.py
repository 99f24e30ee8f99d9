"""The residual stream of a model between its layers, read and replaced by hooks on the layers.

State n is what goes into layer n; of L layers, state L is what the last one puts out, before any
final norm. Layers are found by data flow (`backbone.sites`), and whatever a model computes around
them (masks, rotary positions, embeddings) stays its own, so no architecture needs a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from cfm_train.backbone.load import Backbone


def layers_of(backbone: Backbone) -> list[nn.Module]:
    """The layers of a backbone with one stack, bottom to top."""
    count = backbone.sites.layers[""]
    return [backbone.model.get_submodule(backbone.sites[f"layer.{n}"].module) for n in range(count)]


@contextmanager
def recording(layers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Notes the states of each forward pass inside the block.

    Yields:
        A list that every pass fills anew with L + 1 tensors ``[batch, seq, hidden]``.
    """
    states: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is layers[0]:
            states.clear()
        states.append(args[0] if args else kwargs["hidden_states"])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        states.append(first(output))

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(after))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def first(output: Any) -> Tensor:
    """The hidden states that a layer puts out, which may come with others behind them."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


class Skipped(nn.Module):
    """Stands for a layer that is left out: hands its hidden states on.

    It keeps the layer's plain attributes, by which some models choose what they hand to it (a mask
    for its type of attention), and its place, so that no other layer's number changes.

    Args:
        layer: the layer that is left out; nothing of it but plain attributes is kept.
        tupled: whether the layer puts out a tuple.
    """

    def __init__(self, layer: nn.Module, tupled: bool) -> None:
        super().__init__()
        for key, value in vars(layer).items():
            if not key.startswith("_") and isinstance(value, bool | int | float | str | None):
                setattr(self, key, value)
        self._tupled = tupled

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The hidden states as they came, ``[batch, seq, hidden]``."""
        return (hidden_states, None) if self._tupled else hidden_states
