"""Delta bricks: a change to chosen parameters of the backbone, without touching the backbone.

    linear map   y ← y + x ΔWᵀ + Δb
    norm         y ← y + norm(x; w + Δw, b + Δb) − norm(x; w, b)

With the biases alone it is BitFit (Ben Zaken et al. 2022, arXiv 2106.10199), with the norms alone
LayerNorm tuning (Zhao et al. 2024, arXiv 2312.11420). Parameters are named by their site,
``layer.0.attn.q.bias``. A delta starts as zero: a new brick changes nothing.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfm_train.backbone.plugs import Call, Out
from cfm_train.backbone.sites import Site
from cfm_train.bricks.bank import bias_of, weight_of
from cfm_train.bricks.brick import LINEAR, Brick, parameter_name, some
from cfm_train.bricks.peft_modules import overlap
from cfm_train.errors import UserError

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone

PARTS = ("weight", "bias")


@dataclass(frozen=True)
class Chosen:
    """One chosen parameter: the part (``weight`` or ``bias``) of a site."""

    site: Site
    part: str

    @property
    def name(self) -> str:
        """The site's name and the part."""
        return f"{self.site.name}.{self.part}"


class Delta(Brick):
    """A change to each chosen parameter, of the parameter's own shape.

    Args:
        parameters: patterns of parameters: ``bias`` (all of them), ``attn.q.weight``, ``norm``
            (weights and biases of the norms), ``*norm`` (that of the embedding too).
        layers: numbers of the layers to use, negative ones from the top; None for all. What lies
            outside of the layers, such as the last norm, is kept.
    """

    def __init__(self, parameters: list[str], layers: list[int] | None) -> None:
        super().__init__(parameters=parameters, layers=layers)
        self.delta = nn.ParameterDict()
        self.is_norm: dict[str, bool] = {}

    def build(self, backbone: Backbone) -> Self:
        """Makes a delta of zeros for every chosen parameter.

        Raises:
            UserError: a pattern fits no parameter, or two of them change the same numbers.
        """
        patterns, layers = some(self.hyper["parameters"], "parameters"), self.hyper["layers"]
        chosen = {c.name: c for p in patterns for c in choose(backbone, p, layers)}
        for one, other in itertools.combinations(chosen.values(), 2):
            if one.part == other.part and overlap(one.site, other.site):
                raise UserError(
                    f"The parameters '{one.name}' and '{other.name}' share numbers: choose one."
                )
        for name in backbone.sites:
            for part in PARTS:
                if f"{name}.{part}" in chosen:
                    site = chosen[f"{name}.{part}"].site
                    own = part_of(backbone.model.get_submodule(site.module), site, part)
                    assert own is not None
                    key = parameter_name(f"{name}.{part}")
                    self.delta[key] = nn.Parameter(torch.zeros(own.shape))
                    self.is_norm[name] = site.kind == "norm"
        self.site_names = tuple(self.is_norm)
        return self.to(backbone.device)

    def plugs(self) -> Iterable[Out]:
        """One plug at each site's output."""
        for name in self.site_names:
            keys = [parameter_name(f"{name}.{part}") for part in PARTS]
            weight, bias = (self.delta.get(key, None) for key in keys)
            change = _change_norm if self.is_norm[name] else _change_linear
            yield Out(name, functools.partial(change, weight, bias))


def choose(backbone: Backbone, pattern: str, layers: list[int] | None) -> list[Chosen]:
    """The parameters that a pattern fits, in the backbone's order.

    Args:
        backbone: whose parameters.
        pattern: ``weight`` or ``bias`` alone, after a pattern of sites, or a pattern of sites alone
            for both.
        layers: as in `Delta`.

    Raises:
        UserError: there is no such site, or none of the sites has such a parameter.
    """
    head, _, last = pattern.rpartition(".")
    parts, where = ((last,), head or "*") if last in PARTS else (PARTS, pattern)
    sites = backbone.sites.select([where], layers)
    if where == "*":
        # Every module once: a fused one whole instead of in slices.
        modules = {site.module for site in sites}
        sites = [s for s in backbone.sites.values() if s.rows is None and s.module in modules]
    found = []
    for site in sites:
        if site.kind in (*LINEAR, "norm"):
            module = backbone.model.get_submodule(site.module)
            found += [Chosen(site, p) for p in parts if part_of(module, site, p) is not None]
    if not found:
        raise UserError(
            f"The backbone '{backbone.id}' has no linear map or norm with a parameter '{pattern}': "
            "choose brick.parameters=[norm], or a weight such as attn.q.weight."
        )
    return found


def part_of(module: nn.Module, site: Site, part: str) -> Tensor | None:
    """A site's weight ``[out_features, in_features]`` (of a norm ``[features]``) or bias."""
    if getattr(module, part, None) is None:
        return None
    if site.kind == "norm":
        own: Tensor = getattr(module, part)
        return own
    return weight_of(module, site) if part == "weight" else bias_of(module, site)


def _change_linear(weight: Tensor | None, bias: Tensor | None, call: Call) -> Tensor:
    assert call.y is not None
    dtype = call.y.dtype
    added = None if bias is None else bias.to(dtype)
    if weight is None:
        assert added is not None
        return call.y + added
    return call.y + F.linear(call.x.to(dtype), weight.to(dtype), added)


def _change_norm(weight: Tensor | None, bias: Tensor | None, call: Call) -> Tensor:
    """The norm's output with changed parameters.

    The formula differs between architectures (a mean or none, w or 1 + w), so the module's own code
    computes it. In half precision it runs in float32: a weight near one, rounded to bfloat16, would
    stand still for long.
    """
    assert call.y is not None and call.base is not None
    # With None where a norm has no bias: its code asks for it all the same.
    parameters = call.module._parameters
    own = {name: None if value is None else value.float() for name, value in parameters.items()}
    changed = dict(own)
    for name, change in (("weight", weight), ("bias", bias)):
        before = own.get(name)
        if change is not None and before is not None:
            changed[name] = before + change
    x = call.x.float()
    same = call.base if call.base.dtype == torch.float32 else _run(call.module, own, x)
    return call.y + (_run(call.module, changed, x) - same).to(call.y.dtype)


def _run(module: nn.Module, parameters: dict[str, Tensor | None], x: Tensor) -> Tensor:
    """A module's forward with other parameters; the module itself stays as it is."""
    shell = copy.copy(module)
    object.__setattr__(shell, "_parameters", parameters)
    result: Tensor = shell.forward(x)
    return result
