"""PEFT's layers at work in the slots: any tuner that adapts single modules of the backbone.

PEFT builds its layers in a twin of the backbone's tree (`peft_tree.py`). In a forward pass the slot
of each site hands its layer the module's input and output; the layer's own ``forward`` gives the
output that replaces it. State goes in and out by PEFT's own functions.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cfm_train.backbone.plugs import Call, Out
from cfm_train.bricks.brick import LINEAR
from cfm_train.bricks.peft_budget import RankBudget
from cfm_train.bricks.peft_tree import Offset, keep_layers, twin_tree
from cfm_train.errors import UserError

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone

#: PEFT's name of the one adapter in each tree.
ADAPTER = "default"


class Layers(nn.Module):
    """One tuner's layers for a backbone.

    Args:
        config: PEFT's config; PEFT may complete it.
        backbone: the backbone; only read.
        offset: how the config names the backbone's modules.
        rank_schedule: for AdaLoRA, see `RankBudget`.

    Raises:
        UserError: PEFT refuses the config or a module, adapts one that has no slot, or would change
            the backbone's weights.
    """

    def __init__(
        self,
        config: PeftConfig,
        backbone: Backbone,
        offset: Offset,
        rank_schedule: tuple[int | None, int | None],
    ) -> None:
        super().__init__()
        tuner = tuner_of(config)
        before = _glance(backbone)
        tree = twin_tree(backbone, offset)
        with peft_speaks(tuner, backbone):
            self.model = PeftModel(tree, config)
        layers = keep_layers(tree, BaseTunerLayer)
        if not all(torch.equal(a, b) for a, b in zip(before, _glance(backbone), strict=True)):
            raise UserError(
                f"PEFT's {tuner} with these options rewrites the weights of the backbone itself: "
                "choose other options; the backbone in memory must be loaded again."
            )
        backbone.requires_grad_(False)
        sites = sites_by_module(backbone)
        self.layers: list[tuple[str, nn.Module]] = []
        for path, layer in layers.items():
            if offset.ours(path) not in sites:
                raise UserError(
                    f"PEFT's {tuner} adapts the module '{path}', which is no site of the backbone "
                    f"'{backbone.id}': leave it out of the adapter's target_modules."
                )
            self.layers.append((sites[offset.ours(path)], layer))
        order = {name: at for at, name in enumerate(backbone.sites)}
        self.layers.sort(key=lambda entry: order[entry[0]])
        for value in self.model.parameters():
            if value.requires_grad:
                value.data = value.data.float()
        self.budget: RankBudget | None = None
        if hasattr(self.model.base_model, "rankallocator"):
            self.budget = RankBudget(self.model.base_model, *rank_schedule)

    @property
    def site_names(self) -> tuple[str, ...]:
        """The sites that are adapted, in the backbone's order."""
        return tuple(name for name, _ in self.layers)

    @property
    def rank_pattern(self) -> dict[str, Any] | None:
        """Which ranks of which module the last `state` holds; None for all."""
        config: Any = self.model.peft_config[ADAPTER]
        return getattr(config, "rank_pattern", None) or None

    def plugs(self) -> Iterable[Out]:
        """One plug for each layer, which has its module to itself."""
        for name, layer in self.layers:
            yield Out(name, functools.partial(_run, layer), alone=True)

    def state(self) -> dict[str, Tensor]:
        """The tensors as PEFT names and stores them, without aliases."""
        config: Any = self.model.peft_config[ADAPTER]
        if self.budget is not None:
            config.rank_pattern = self.budget.pattern_to_save()
        state = get_peft_model_state_dict(self.model, adapter_name=ADAPTER)
        return {name: value.detach().clone().contiguous() for name, value in state.items()}

    def set_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the tensors that `state` gave, or that PEFT saved.

        Raises:
            UserError: a tensor is missing, unknown or of another shape.
        """
        own = get_peft_model_state_dict(self.model, adapter_name=ADAPTER).keys()
        for what, names in (
            ("misses the tensor", own - tensors.keys()),
            ("holds a tensor that PEFT does not use,", tensors.keys() - own),
        ):
            if names:
                raise UserError(
                    f"The adapter {what} '{sorted(names)[0]}' ({len(names)} in all): config and "
                    "tensors do not belong together, or it was made for another backbone."
                )
        try:
            set_peft_model_state_dict(self.model, dict(tensors), adapter_name=ADAPTER)
        except RuntimeError as error:
            line = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"The adapter does not fit the backbone: {line}") from None
        self.budget = None  # ranks that were cut are gone

    def penalty(self) -> Tensor | None:
        """What AdaLoRA adds to the loss to keep its factors orthogonal; None for other tuners."""
        if self.budget is None:
            return None
        loss: Tensor = self.model.base_model(None).loss
        return loss

    def after_step(self, step: int, total: int) -> None:
        """AdaLoRA's share of rank among the sites; nothing for other tuners."""
        if self.budget is not None:
            self.budget.after_step(step, total)


def _run(layer: nn.Module, call: Call) -> Tensor:
    """The output of one layer in place of the site's, in the backbone's dtype."""
    assert call.base is not None
    base: Any = layer.base_layer
    if isinstance(layer, LNTuningLayer):  # a norm of its own: in float32, as its parameters are
        return layer(call.x.float()).to(call.base.dtype)
    base.told = (call.x, call.base)
    try:
        answer: Tensor = layer(call.x)
    finally:
        base.told = None
    return answer.to(call.base.dtype)


def _glance(backbone: Backbone) -> list[Tensor]:
    """Up to 64 numbers of every tensor, spread over it: what a rewritten weight shows at once."""
    with torch.no_grad():
        flat = [value.detach().reshape(-1) for value in backbone.model.parameters()]
        return [value[:: len(value) // 64 + 1].clone() for value in flat]


def tuner_of(config: PeftConfig) -> str:
    """The name of a config's tuner, in small letters."""
    kind: Any = config.peft_type
    return str(kind.value).lower()


def sites_by_module(backbone: Backbone) -> dict[str, str]:
    """The whole sites that PEFT may adapt, by the path of their module."""
    kinds = (*LINEAR, "norm")
    return {s.module: s.name for s in backbone.sites.values() if s.rows is None and s.kind in kinds}


@contextmanager
def peft_speaks(tuner: str, backbone: Backbone) -> Iterator[None]:
    """Turns what PEFT raises while it builds into one sentence, and keeps its advice to itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (
            TypeError,
            ValueError,
            LookupError,
            RuntimeError,
            AssertionError,
            ImportError,
        ) as error:
            line = " ".join(str(error).split())[:300].rstrip(".")
            raise UserError(
                f"PEFT's {tuner} does not work on the backbone '{backbone.id}' with these options: "
                f"{line}. Choose other options, or brick=lora."
            ) from None
