"""The plan of a backbone made from layers of others: which tensor comes from where, which config.

Passthrough merging, as in frankenmerges and depth up-scaling (Kim et al. 2023, arXiv 2312.15166):
layers are taken as they are, in any order, with overlaps and repeats. What stands around the stack
comes from one model each: what runs before the first layer from ``embed``, the rest from ``head``.

Layers fit together only where the models differ in nothing but their weights and their number of
layers, so every key of the configs is compared, defaults included. And a layer must do at its new
place what it did at its old one: both places are built on the meta device and compared, parameter
shapes and plain attributes (a sliding window, a type of attention) alike.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from cfm_train.backbone.configs import FREE
from cfm_train.backbone.pretrained import skeleton
from cfm_train.backbone.roles import assign
from cfm_train.backbone.sites import SiteMap
from cfm_train.backbone.spec import ResolvedBackbone
from cfm_train.backbone.tensors import Placed
from cfm_train.backbone.trace import Trace, trace
from cfm_train.errors import UserError
from cfm_train.stitching.layers.sources import Slice, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Plan:
    """A backbone to be written.

    Attributes:
        tensors: name in the new backbone -> where the bytes lie.
        config: its ``config.json``.
        companion: the source whose tokenizer it gets.
    """

    tensors: dict[str, Placed]
    config: dict[str, Any]
    companion: Source


@dataclass(frozen=True)
class _Opened:
    """A source, built on the meta device and traced."""

    source: Source
    model: PreTrainedModel
    trace: Trace
    sites: SiteMap

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = self.model.config.to_dict()
        return found

    def layer(self, number: int) -> nn.Module:
        return self.model.get_submodule(self.sites[f"layer.{number}"].module)

    @property
    def tied(self) -> bool:
        """Whether the language model's head is the embedding."""
        return "head" in self.sites and bool(getattr(self.model.config, "tie_word_embeddings", 0))

    def tensor(self, site: str) -> str:
        """The name that the weight of a site has, or would have, in the checkpoint."""
        name = f"{self.sites[site].module}.weight"
        base = f"{self.model.base_model_prefix}."
        stored = [one for one in (name, name.removeprefix(base)) if one in self.source.around]
        return stored[0] if stored else name

    def before_the_stack(self, name: str) -> bool:
        """Whether the module of a tensor runs before the first layer does."""
        module, ran = name.rpartition(".")[0], self.trace.ran
        path = next(
            (p for p in (module, f"{self.model.base_model_prefix}.{module}") if p in ran), ""
        )
        return bool(path) and ran[path] < ran[self.sites["layer.0"].module]


def assemble(slices: Sequence[Slice], *, embed: str, head: str, untie: bool) -> Plan:
    """Plans a backbone from slices of others, reading configs and headers alone.

    Args:
        slices: the layers, bottom to top.
        embed: ``first`` or ``last``: whose embeddings (all that runs before the stack) it gets.
        head: ``first`` or ``last``: whose norm and head (all that runs after it) it gets.
        untie: write head and embedding apart where they are one tensor in a source.

    Raises:
        UserError: the models do not fit together, or a layer would change its function.
    """
    opened = {s.source.label: _open(s.source) for s in slices}
    ends = {"first": opened[slices[0].source.label], "last": opened[slices[-1].source.label]}
    first, bottom, top = next(iter(opened.values())), ends[embed], ends[head]
    for other in opened.values():
        _agree(first, other)
    layers = [(opened[s.source.label], n) for s in slices for n in range(s.start, s.stop)]
    tensors = _around(bottom, top, untie)
    for number, (donor, old) in enumerate(layers):
        for rest, placed in donor.source.layers[old].items():
            tensors[f"{bottom.source.stack}.{number}.{rest}"] = placed
    _one_dtype(tensors)
    config = _config(bottom, layers)
    if bottom is not top and (bottom.tied or top.tied):
        config["tie_word_embeddings"] = False
    _same_function(config, layers)
    return Plan(tensors, config, bottom.source)


def _open(source: Source) -> _Opened:
    model = skeleton(source.backbone)
    record = trace(model)
    sites = assign(record)
    count = len(source.layers)
    told = getattr(model.config, "num_hidden_layers", None)
    if sites.layers != {"": count} or told != count:
        raise UserError(
            f"The weights of '{source.name}' hold {count} layers, its config tells {told} and its "
            f"forward pass shows {sum(sites.layers.values())}: only models with one stack of "
            "layers, each run once, can be stitched."
        )
    path = sites["layer.0"].module.removesuffix(".0")
    if path != source.stack and not path.endswith(f".{source.stack}"):
        raise UserError(
            f"The layers of '{source.name}' are '{source.stack}' in its weights and '{path}' in "
            "its model: they cannot be told apart, so it cannot be stitched."
        )
    return _Opened(source, model, record, sites)


def _agree(one: _Opened, other: _Opened) -> None:
    """Refuses two models that differ in more than weights and number of layers."""
    a, b = one.config, other.config
    names = f"'{one.source.name}' and '{other.source.name}'"
    if type(one.model) is not type(other.model) or one.source.stack != other.source.stack:
        raise UserError(
            f"{names} are a {type(one.model).__name__} and a {type(other.model).__name__} with "
            f"layers in '{one.source.stack}' and '{other.source.stack}': layers are stitched as "
            "they are only within one architecture; use recipe=stitch/bridge."
        )
    for key in sorted(a.keys() | b.keys()):
        free = key in FREE or key == "num_hidden_layers" or "drop" in key
        if free or (_per_layer(key, a, one) and _per_layer(key, b, other)):
            continue
        if a.get(key) != b.get(key):
            raise UserError(
                f"{names} differ in '{key}' ({a.get(key)} and {b.get(key)}): layers are stitched "
                "as they are only between models of one shape; use recipe=stitch/bridge."
            )


def _per_layer(key: str, config: dict[str, Any], opened: _Opened) -> bool:
    value = config.get(key)
    return "layer" in key and isinstance(value, list) and len(value) == len(opened.source.layers)


def _around(bottom: _Opened, top: _Opened, untie: bool) -> dict[str, Placed]:
    """The tensors that are in no layer."""
    if bottom is top:
        return dict(bottom.source.around)
    below = {n: p for n, p in bottom.source.around.items() if bottom.before_the_stack(n)}
    above = {n: p for n, p in top.source.around.items() if not top.before_the_stack(n)}
    tied = [one for one in (bottom, top) if one.tied]
    if not tied:
        return {**below, **above}
    if not untie:
        raise UserError(
            f"In '{tied[0].source.name}' embedding and head are one tensor, but embed and head "
            "are to come from two models: take both from one (embed=last or head=first), or "
            "write them apart with untie=true."
        )
    name = top.tensor("head")
    above[name] = top.source.around[top.tensor("embed") if top.tied else name]
    return {**below, **above}


def _one_dtype(tensors: dict[str, Placed]) -> None:
    seen: dict[str, str] = {}
    for name, placed in tensors.items():
        seen.setdefault(placed.info.dtype, name)
    if len(seen) > 1 and len({p.file.parent for p in tensors.values()}) > 1:
        (a, name_a), (b, name_b), *_ = seen.items()
        raise UserError(
            f"The weights have different dtypes ('{name_a}' {a}, '{name_b}' {b}), and loading "
            "would round some of them: save the models in one dtype first."
        )


def _config(bottom: _Opened, layers: Sequence[tuple[_Opened, int]]) -> dict[str, Any]:
    """``config.json`` of the new backbone: the bottom's, with what is told layer by layer."""
    config = dict(bottom.source.backbone.config)
    count = bottom.model.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    config[count] = len(layers)
    for key in bottom.config:
        if all(_per_layer(key, donor.config, donor) for donor, _ in layers):
            config[key] = [donor.config[key][old] for donor, old in layers]
    return config


def _same_function(config: dict[str, Any], layers: Sequence[tuple[_Opened, int]]) -> None:
    """Compares every layer at its new place with the same layer at its old one."""
    with tempfile.TemporaryDirectory(prefix="cfm-stitch-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        model = skeleton(ResolvedBackbone("the stitched model", folder, [], config))
    path = layers[0][0].sites["layer.0"].module.removesuffix(".0")
    for new, (donor, old) in enumerate(layers):
        there = _described(donor.layer(old), old)
        here = _described(model.get_submodule(f"{path}.{new}"), new)
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) != here.get(key):
                raise UserError(
                    f"Layer {old} of '{donor.source.name}' would be layer {new} and work in "
                    f"another way there ('{key}' is {there.get(key)} and would be "
                    f"{here.get(key)}): take layers in an order that keeps it."
                )


def _described(layer: nn.Module, number: int) -> dict[str, Any]:
    """Shapes and plain attributes of a layer; its own number reads the same at every place."""
    found: dict[str, Any] = {n: tuple(p.shape) for n, p in layer.named_parameters()}
    for path, module in layer.named_modules():
        found[f"{path}.class"] = type(module).__name__
        for key, value in vars(module).items():
            if key == "training" or not isinstance(value, bool | int | float | str | None):
                continue
            own = type(value) is int and value == number and "layer" in key
            found[f"{path}.{key}".lstrip(".")] = "its own number" if own else value
    return found
