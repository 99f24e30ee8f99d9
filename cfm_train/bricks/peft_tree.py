"""A twin of the backbone's module tree, for PEFT to put its layers into instead of the backbone.

PEFT adapts a model by replacing modules in its tree. Here it gets a tree of empty modules with the
backbone's names, whose leaves are twins of the backbone's own: the same class and the very same
parameters, none of its hooks. PEFT's layers stay in the twin tree; the slots of the backbone call
them (`peft_layers.py`), and a layer that asks its base layer for the answer to the slot's own input
gets what the backbone has just computed. So nothing is ever put into the backbone, and nothing has
to be taken out.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from types import MethodType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfm_train.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cfm_train.backbone.load import Backbone


@dataclass(frozen=True)
class Offset:
    """How paths in an adapter differ from the backbone's: PEFT names modules from what it wrapped.

    Attributes:
        added: what the adapter has in front (``bert`` of a ``BertForSequenceClassification``).
        left_out: what it lacks (``model`` where PEFT wrapped a decoder without its head).
    """

    added: str = ""
    left_out: str = ""

    def ours(self, path: str) -> str:
        """The backbone's path of a module that the adapter calls ``path``."""
        path = path.removeprefix(f"{self.added}.") if self.added else path
        return f"{self.left_out}.{path}" if self.left_out else path


def find_offset(tensors: Iterable[str], targets: Iterable[str], modules: Iterable[str]) -> Offset:
    """How an adapter's names differ from the backbone's module paths.

    Args:
        tensors: names of the adapter's tensors.
        targets: its ``target_modules``, which are paths or the ends of paths.
        modules: paths of the backbone's modules that may be adapted.

    Raises:
        UserError: the adapter lacks the start of the paths, and several would fit.
    """
    names, known = [f"{name}." for name in tensors], list(modules)
    both = [*names, *(f"{target}." for target in targets)]
    if any(name.startswith(f"{module}.") for name in both for module in known):
        return Offset()
    for name in both:
        for module in known:
            if f".{module}." in name:
                return Offset(added=name.partition(f".{module}.")[0])
    starts = {start for name in names for module in known for start in _starts(name, module)}
    if len(starts) > 1:
        raise UserError(
            f"The adapter's modules may lie in any of {', '.join(sorted(starts))}: save it from "
            "the whole model, so that its names say which."
        )
    return Offset(left_out=min(starts, default=""))


def _starts(name: str, module: str) -> Iterable[str]:
    """What a module's path has in front of what a tensor's name begins with."""
    parts = module.split(".")
    for cut in range(1, len(parts) - 1):
        if name.startswith(".".join(parts[cut:]) + "."):
            yield ".".join(parts[:cut])


class Empty(nn.Module):
    """A module of the tree without its function; AdaLoRA asks the root for a loss to add to."""

    def forward(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
        """A loss of zero."""
        return SimpleNamespace(loss=torch.zeros(()))


def twin_tree(backbone: Backbone, offset: Offset) -> nn.Module:
    """The tree of a backbone's modules as an adapter names them, its leaves being twins.

    Args:
        backbone: the backbone; not changed.
        offset: see `Offset`.
    """
    tree = _twin(backbone.model.get_submodule(offset.left_out), set())
    assert tree is not None
    for name in reversed(offset.added.split(".") if offset.added else []):
        above = Empty()
        above.add_module(name, tree)
        tree = above
    tree.config = backbone.model.config.to_dict()
    tree.is_gradient_checkpointing = False  # type: ignore[assignment]
    return tree


def _twin(module: nn.Module, seen: set[nn.Module]) -> nn.Module | None:
    if module in seen:  # PEFT adapts a module once, by its first name
        return None
    seen.add(module)
    children = [(name, child) for name, child in module.named_children()]
    if not children:
        return twin_of(module)
    tree = Empty()
    for name, child in children:
        below = _twin(child, seen)
        if below is not None:
            tree.add_module(name, below)
    return tree


def twin_of(module: nn.Module) -> nn.Module:
    """A module with the same class and parameters, without hooks, that can be told an answer."""
    twin = copy.copy(module)
    for name in vars(twin):
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            twin.__dict__[name] = OrderedDict()
    twin.told = None  # type: ignore[assignment]
    twin.forward = MethodType(_forward, twin)
    return twin


def _forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The answer that the twin was told for this very input, else its own."""
    told: Any = self.told
    if told is not None and told[0] is x:
        return told[1].clone()  # some of PEFT's layers add to it in place
    answer: Tensor = type(self).forward(self, x, *args, **kwargs)
    return answer


def keep_layers(tree: nn.Module, layer_class: type) -> dict[str, nn.Module]:
    """Takes the twins out of a tree that PEFT has adapted, so that it holds PEFT's layers alone.

    A layer keeps its twin as a plain attribute: the backbone's parameters are then no part of the
    tree's parameters, buffers or state, and moving or training the tree leaves them alone.

    Args:
        tree: the tree; changed in place.
        layer_class: PEFT's class of adapted layers.

    Returns:
        The layers by their path in the tree.
    """
    layers: dict[str, nn.Module] = {}
    for name, child in list(tree.named_children()):
        if isinstance(child, layer_class):
            base = child._modules.pop("base_layer")
            child.__dict__["base_layer"] = base
            layers[name] = child
            continue
        below = keep_layers(child, layer_class)
        layers |= {f"{name}.{path}": layer for path, layer in below.items()}
        if not below:
            del tree._modules[name]
    return layers
