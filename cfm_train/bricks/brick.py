"""The contract of a brick: a named group of parameters with one function, and where it plugs in.

A brick kind is one file in this folder with one subclass of `Brick`; its name is the file's name,
its defaults stand in ``conf/brick/<kind>.yaml`` alone. A kind says three things:

    build     which parameters it has on a given backbone (float32, of its own)
    plugs     what it puts into which slots (`backbone.slots`)
    files     how it lies on disk: PEFT's format where PEFT can read it, else ``brick.safetensors``

A brick may carry heads: small named modules on the backbone's hidden states, one for each task.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from cfm_train.backbone.plugs import Plug
from cfm_train.backbone.sites import Site
from cfm_train.bricks.heads import Head, Heads
from cfm_train.errors import UserError
from cfm_train.library.card import HEADS_FILE

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.data.encode import TaskData

T = TypeVar("T")

NATIVE_FILE = "brick.safetensors"

#: Kinds of sites whose module is one linear map (``head`` is a language model's).
LINEAR = ("linear", "conv1d", "head")


@dataclass(frozen=True)
class Derived:
    """How a brick that is not trained was made.

    Attributes:
        rows, tokens: how much was read for it.
        scores: what was tried, and its loss on validation rows; ``without`` is the bare backbone.
    """

    rows: int
    tokens: int
    scores: dict[str, float]


class Brick(nn.Module, ABC):
    """Base class of all brick kinds.

    Subclasses have an annotated ``__init__`` without defaults whose arguments are the kind's
    hyper-parameters: they are kept in `hyper` and written into the brick's card.

    Attributes:
        kind: the kind's name, that of its file and of its YAML.
        granularity: ``neuron``, ``neuron_group``, ``layer`` or ``model``.
        starts_as_identity: whether a new brick leaves every logit as it was, to the bit.
        neutral: the value of every parameter with which the kind does nothing (merging measures
            updates from there).
        trains_backbone: whether the model's own parameters are what is trained (pretraining).
        trains: whether the kind is trained; else `fit_without_training` makes it (a task vector).
        hyper: the hyper-parameters, as plain JSON values.
        heads: the heads by task name.
        site_names: the sites that the brick was built for.
    """

    kind: ClassVar[str]
    granularity: ClassVar[str] = "layer"
    starts_as_identity: ClassVar[bool] = True
    neutral: ClassVar[float] = 0.0
    trains: ClassVar[bool] = True
    trains_backbone: ClassVar[bool] = False

    hyper: dict[str, Any]
    site_names: tuple[str, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not inspect.isabstract(cls):
            cls.kind = cls.__module__.rsplit(".", 1)[-1]

    def __init__(self, **hyper: Any) -> None:
        super().__init__()
        self.hyper = hyper
        self.heads = Heads()
        self.site_names = ()

    def about(self, ids: Tensor) -> Self:
        """Tells a brick, before it is built, the text that it is to hold, and returns the brick.

        Args:
            ids: its token ids ``[tokens]``; kinds that do not start from a text pass them over.
        """
        return self

    @abstractmethod
    def build(self, backbone: Backbone) -> Self:
        """Makes the parameters for a backbone (float32, on its device) and returns the brick.

        Raises:
            UserError: a site pattern matches nothing, or the kind does not fit a site.
        """

    @abstractmethod
    def plugs(self) -> Iterable[Plug]:
        """What the brick puts into the backbone's slots; called each time a plan is made."""

    def needs(self) -> list[str]:
        """Fingerprints of what the brick means nothing without, besides its backbone."""
        return []

    def penalty(self) -> Tensor | None:
        """What the kind adds to each training step's loss, a scalar; None for nothing."""
        return None

    def after_step(self, step: int, total: int) -> None:
        """Called in training after each optimiser step, while its gradients are still there.

        Args:
            step: optimiser steps done, from 1 on.
            total: optimiser steps of the whole run.
        """

    def fit_without_training(
        self, backbone: Backbone, tasks: Mapping[str, TaskData], seed: int
    ) -> Derived:
        """Makes the brick from data alone, as kinds with ``trains = False`` do.

        Args:
            backbone: the backbone that it was built for, nothing plugged.
            tasks: the tasks by name.
            seed: decides everything that is drawn.

        Raises:
            UserError: the tasks are not of a kind that it can be made from.
        """
        raise UserError(f"Bricks of kind {self.kind} are trained, not derived from data.")

    def tensors(self) -> dict[str, Tensor]:
        """The brick's own parameters by name, without its heads: what a version is hashed from."""
        return {
            name: value.detach()
            for name, value in self.state_dict().items()
            if not name.startswith("heads.")
        }

    def interface(self) -> dict[str, Any]:
        """JSON values that, with the tensors, define what the brick computes."""
        return {"kind": self.kind, "hyper": self.hyper, "sites": list(self.site_names)}

    def files(self) -> dict[str, bytes]:
        """The brick's files by name, ready for the library; heads in a file of their own."""
        files = self.body_files()
        heads = {
            f"{task}.{name}": value.detach().contiguous().cpu()
            for task, head in self.heads.items()
            for name, value in head.state_dict().items()
        }
        if heads:
            files[HEADS_FILE] = save(heads)
        return files

    def body_files(self) -> dict[str, bytes]:
        """The files without the heads; kinds that PEFT knows override it with PEFT's format."""
        tensors = {name: value.contiguous().cpu() for name, value in self.tensors().items()}
        return {NATIVE_FILE: save(tensors)} if tensors else {}

    @classmethod
    def restore(
        cls, interface: Mapping[str, Any], files: Mapping[str, bytes], backbone: Backbone
    ) -> Self:
        """A brick from what `interface` and `body_files` gave.

        Raises:
            UserError: a tensor is missing, unknown, or of another shape than the backbone needs.
        """
        from safetensors.torch import load

        brick = cls(**interface["hyper"]).build(backbone)
        tensors = load(files[NATIVE_FILE]) if NATIVE_FILE in files else {}
        brick.load_tensors(tensors)
        return brick

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the brick's own parameters by value; nothing missing, nothing left over."""
        own = self.tensors()
        for what, names in (
            ("misses", own.keys() - tensors),
            ("does not know", tensors - own.keys()),
        ):
            if names:
                raise UserError(
                    f"The {self.kind} brick {what} the tensor '{sorted(names)[0]}' "
                    f"({len(names)} in all): it was made for other sites or another version."
                )
        with torch.no_grad():
            for name, value in self.state_dict(keep_vars=True).items():
                if name.startswith("heads."):
                    continue
                if value.shape != tensors[name].shape:
                    raise UserError(
                        f"Tensor '{name}' of the {self.kind} brick has shape "
                        f"{tuple(tensors[name].shape)}, but the backbone needs "
                        f"{tuple(value.shape)}."
                    )
                value.copy_(tensors[name])

    def add_head(self, task: str, head: Head) -> None:
        """Gives the brick a head for a task; its tensors are named by it."""
        self.heads[task] = head

    def head_for(self, task: str) -> Head | None:
        """The head of a task, None where the brick has none for it."""
        head = self.heads[task] if task in self.heads else None  # noqa: SIM401 (no `get` there)
        return cast("Head | None", head)

    def describe_heads(self) -> dict[str, dict[str, Any]]:
        """The heads for the card: type, labels, pooling and size of each."""
        return {task: cast(Head, head).describe() for task, head in self.heads.items()}

    def parameter_count(self) -> int:
        """How many numbers are trained, heads included."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def linear_sites(backbone: Backbone, patterns: list[str], layers: list[int] | None) -> list[Site]:
    """The linear sites that patterns choose, in the backbone's order.

    Raises:
        UserError: a pattern matches nothing, or a site that is no linear layer.
    """
    chosen = backbone.sites.select(patterns, layers)
    for site in chosen:
        if site.kind not in LINEAR:
            raise UserError(
                f"Site '{site.name}' is a {site.kind}, not a linear layer: choose sites such as "
                "attn.q, attn.v, ffn.up or ffn.down."
            )
    return chosen


def some(chosen: list[T], key: str) -> list[T]:
    """What was chosen, unless it is nothing.

    Raises:
        UserError: the list is empty, so that the brick would have no parameters.
    """
    if not chosen:
        raise UserError(f"brick.{key} is empty: name what the brick shall change, such as attn.q.")
    return chosen


def parameter_name(site_name: str) -> str:
    """A site's name as a key of ``nn.ParameterDict``, which allows no dots."""
    return site_name.replace(".", "-")


def json_bytes(value: Any) -> bytes:
    """A JSON file's bytes, stable: sorted keys, two spaces, one newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
