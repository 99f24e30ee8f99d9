"""A language model of two: the bottom layers of one, a bridge, the top layers of another.

    input_ids ─► bottom's embeddings, layers 0 … i-1 ─► bridge ─► top's layers j … ─► norm, head

Both models see the same token ids and compute masks and positions in their own way; where the
bottom stops, its states go through the bridge and take the place of what would have gone into layer
j of the top. The layers that are left out are taken out of memory. The bridge is a brick: plugging
it in is setting `StitchedModel.bridge`, so training, checkpoints and evaluation are those of every
other brick.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from cfm_train.backbone.load import Backbone
from cfm_train.backbone.sites import Site, SiteMap
from cfm_train.errors import UserError
from cfm_train.stitching.layers.capture import Skipped, first, layers_of

Map = Callable[[Tensor], Tensor]


class StitchedModel(nn.Module):
    """Bottom layers, a map, top layers.

    Args:
        bottom: a causal language model; its layers from ``at[0]`` on are taken out of it.
        top: another with the same tokenizer; its layers below ``at[1]`` are taken out of it.
        at: how many layers of the bottom run, and how many of the top are left out.

    Attributes:
        bridge: float32 ``[batch, seq, bottom width]`` to ``[batch, seq, top width]``; None where
            none is plugged in, and then the model does not run.
    """

    def __init__(self, bottom: Backbone, top: Backbone, at: tuple[int, int]) -> None:
        super().__init__()
        i, j = at
        lower, upper = layers_of(bottom), layers_of(top)
        _leave_out(bottom, lower[i:])
        _leave_out(top, upper[:j])
        self.bottom, self.top = bottom.model, top.model
        # What a transformers model says of itself, as far as the cost of a step depends on it.
        self.config = SimpleNamespace(
            num_hidden_layers=i + len(upper) - j,
            num_experts_per_tok=getattr(top.model.config, "num_experts_per_tok", 1),
        )
        self.bridge: Map | None = None
        self._fed: Tensor | None = None
        self._seen: Tensor | None = None
        self._takes_keep = "logits_to_keep" in inspect.signature(self.top.forward).parameters
        lower[i - 1].register_forward_hook(self._note)
        upper[j].register_forward_pre_hook(self._feed, with_kwargs=True)

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self._seen = first(output)

    def _feed(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        assert self._fed is not None
        if args:
            return (self._fed, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._fed}

    def bottom_states(self, input_ids: Tensor, **given: Any) -> Tensor:
        """What the bottom's last running layer puts out, ``[batch, seq, bottom width]``."""
        self.bottom.base_model(input_ids=input_ids, use_cache=False, **given)
        seen, self._seen = self._seen, None
        assert seen is not None
        return seen

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool = False,
    ) -> Any:
        """Logits of the next token.

        Args:
            input_ids: ``[batch, seq]`` int64.
            attention_mask: ``[batch, seq]``, 1 for a token and 0 for padding.
            position_ids: ``[batch, seq]`` int64, where they are not 0, 1, 2, ….
            logits_to_keep: the positions to multiply the vocabulary with; 0 for all.
            use_cache: must be false: there is no cache over two models.

        Returns:
            An object whose ``logits`` are ``[batch, positions, vocabulary]``.

        Raises:
            UserError: no bridge is plugged in.
        """
        if self.bridge is None:
            raise UserError("No bridge is plugged into the stitched model: plug one in first.")
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        given = {key: value for key, value in given.items() if value is not None}
        states = self.bottom_states(input_ids, **given)
        more: dict[str, Any] = {"logits_to_keep": logits_to_keep} if self._takes_keep else {}
        self._fed = self.bridge(states.float()).to(self.top.dtype)
        try:
            output = self.top(input_ids=input_ids, use_cache=False, **given, **more)
        finally:
            self._fed = None
        logits = output.logits
        if not self._takes_keep and isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep]
        return SimpleNamespace(logits=logits)

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, max_new_tokens: int, stop: Sequence[int] = ()) -> Tensor:
        """Greedy continuation, every token computed from the whole text.

        Args:
            input_ids: ``[1, seq]`` int64.
            max_new_tokens: most tokens to add.
            stop: token ids after which it ends.

        Returns:
            ``[1, seq + new]``.
        """
        for _ in range(max_new_tokens):
            token = self(input_ids).logits[:, -1].argmax(dim=-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], dim=1)
            if int(token) in stop:
                break
        return input_ids


class BridgeSlot:
    """The one place of a stitched model where something plugs in: between the two halves."""

    def __init__(self, model: StitchedModel) -> None:
        self.model = model
        self.plan: list[tuple[Any, None]] = []

    def plug(self, bricks: Sequence[Any], weights: Any = None) -> None:
        """Puts the one bridge in; no brick takes it out."""
        if len(bricks) > 1 or weights:
            raise UserError("A stitched model takes one bridge, without a weight.")
        self.plan = [(brick, None) for brick in bricks]
        self.model.bridge = bricks[0] if bricks else None

    def unplug(self) -> None:
        """Takes the bridge out."""
        self.plug([])

    def take(self, batch: Mapping[str, Any]) -> None:
        """Nothing: a bridge reads hidden states alone, and no batch."""

    @contextmanager
    def plugged(self, bricks: Sequence[Any], weights: Any = None) -> Iterator[None]:
        """Plugs a bridge for the length of a ``with`` block, then restores what was before it."""
        before = [brick for brick, _ in self.plan]
        self.plug(bricks, weights)
        try:
            yield
        finally:
            self.plug(before)


class StitchedBackbone(Backbone):
    """Two frozen half models as one backbone, with a slot for the bridge between them.

    Args:
        bottom: see `StitchedModel`; both backbones are taken over and lose layers.
        top: the model whose head answers.
        at: how many layers of the bottom run, and how many of the top are left out.

    Attributes:
        at: as given.
        widths: widths of the two residual streams.
        layers: how many layers the two models had.
        parts: id and fingerprint of the bottom and of the top.
    """

    def __init__(self, bottom: Backbone, top: Backbone, at: tuple[int, int]) -> None:
        model = StitchedModel(bottom, top, at)
        parts = [(one.id, one.fingerprint) for one in (bottom, top)]
        super().__init__(
            cast(Any, model),
            bottom.tokenizer,
            _sites(model, bottom, top, at),
            cast(Any, BridgeSlot(model)),
            family="decoder",
            id=f"{bottom.id} + {top.id}",
            fingerprint=hashlib.sha256(f"{parts[0][1]}+{parts[1][1]}".encode()).hexdigest(),
            dtype=top.dtype,
        )
        self.at = at
        self.widths = (bottom.hidden_size, top.hidden_size)
        self.layers = (bottom.sites.layers[""], top.sites.layers[""])
        self.parts = parts

    def logits(self, **batch: Any) -> Tensor:
        """The language model's logits ``[batch, seq, vocabulary]``."""
        logits: Tensor = self.model(**batch).logits
        return logits


def check_causal(backbone: Backbone) -> None:
    """Refuses a model that cannot be half of a stitched language model.

    Raises:
        UserError: it is no causal language model with one stack of layers.
    """
    head = backbone.model.get_output_embeddings()
    if backbone.family != "decoder" or list(backbone.sites.layers) != [""] or head is None:
        raise UserError(
            f"'{backbone.id}' is no causal language model, so it has no next-token loss to be "
            "stitched by: choose two decoders with their heads."
        )


def _leave_out(backbone: Backbone, layers: Sequence[nn.Module]) -> None:
    """Replaces layers of a backbone by `Skipped`."""
    if not layers:
        return
    tupled: dict[nn.Module, bool] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        tupled[module] = isinstance(output, tuple)

    handles = [layer.register_forward_hook(note) for layer in layers]
    with torch.inference_mode():
        ids = torch.zeros(1, 2, dtype=torch.int64, device=backbone.device)
        backbone.model.base_model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    names = {module: path for path, module in backbone.model.named_modules()}
    for layer in layers:
        parent, _, number = names[layer].rpartition(".")
        cast(nn.ModuleList, backbone.model.get_submodule(parent))[int(number)] = Skipped(
            layer, tupled[layer]
        )


def _sites(model: StitchedModel, bottom: Backbone, top: Backbone, at: tuple[int, int]) -> SiteMap:
    """The sites that are left, numbered as they run: the bottom's layers, then the top's."""
    kept: list[Site] = []
    for half, backbone, moved in (("bottom", bottom, 0), ("top", top, at[0] - at[1])):
        modules = backbone.model.named_modules()
        there = {path for path, one in modules if not isinstance(one, Skipped)}
        for name, site in backbone.sites.items():
            around = {"bottom": ("embed", "embed_norm"), "top": ("norm", "head")}[half]
            if site.module not in there or (site.layer is None and name not in around):
                continue
            if site.layer is not None:
                rest = name.removeprefix(f"layer.{site.layer}")
                name = f"layer.{site.layer + moved}{rest}"
            kept.append(dataclasses.replace(site, name=name, module=f"{half}.{site.module}"))
    return SiteMap(kept, top.hidden_size, {"": model.config.num_hidden_layers})
