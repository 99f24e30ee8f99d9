"""IA3 bricks: a learned factor for every feature of keys, values and the feed-forward's inside.

    y = l ⊙ (W x + b)  at attention's k and v         y = W (l ⊙ x) + b  at the feed-forward's down

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning", arXiv 2205.05638. The factors start as one: a new brick changes nothing. On disk the
brick is PEFT's own format, where a fused module (GPT-2's c_attn) has one vector: of the slices that
the brick scales, and one elsewhere; ``interface["slices"]`` lets us take it apart again.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from cfm_train.backbone.plugs import Call, In, Out
from cfm_train.backbone.sites import Site
from cfm_train.bricks.brick import Brick, json_bytes, linear_sites, parameter_name, some
from cfm_train.bricks.peft_modules import (
    PREFIX,
    TASK_TYPES,
    find_site,
    overlap,
    rows_in,
)
from cfm_train.errors import UserError
from cfm_train.library.peft_checks import check_computed
from cfm_train.library.peft_format import CONFIG_FILE, TENSOR_FILE, aside_tensors

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone

SUFFIX = ".ia3_l"


class IA3(Brick):
    """One factor for each feature of the chosen sites.

    Args:
        sites: patterns of linear sites whose output is scaled, such as ``attn.k``; ``k`` takes the
            keys of self- and cross-attention.
        inputs: patterns of linear sites whose input is scaled, such as ``ffn.down``.
        layers: numbers of the layers to use, negative ones from the top; None for all.
    """

    neutral: ClassVar[float] = 1.0

    def __init__(self, sites: list[str], inputs: list[str], layers: list[int] | None) -> None:
        super().__init__(sites=sites, inputs=inputs, layers=layers)
        self.factors = nn.ParameterDict()
        self.scaled_inputs: set[str] = set()
        self.built_for: dict[str, Site] = {}
        self.widths: dict[str, int] = {}
        self.task_type = TASK_TYPES["encoder"]

    def build(self, backbone: Backbone) -> Self:
        """Makes a vector of ones for every chosen site.

        Raises:
            UserError: two of the sites share features, or an input belongs to other sites too.
        """
        outputs = linear_sites(backbone, self.hyper["sites"], self.hyper["layers"])
        inputs = linear_sites(backbone, self.hyper["inputs"], self.hyper["layers"])
        for one, other in itertools.combinations(some([*outputs, *inputs], "sites"), 2):
            if overlap(one, other):
                raise UserError(
                    f"The sites '{one.name}' and '{other.name}' are one module or parts that "
                    "overlap: choose one of them, in brick.sites or in brick.inputs."
                )
        for site in inputs:
            if site.rows is not None:
                raise UserError(
                    f"Site '{site.name}' shares its input with other sites of the fused module "
                    f"'{site.module}': put it into brick.sites, or name the whole module."
                )
        self.know(backbone)
        for site in outputs:
            self.add_site(site, torch.ones(site.out_features), is_input=False)
        for site in inputs:
            self.add_site(site, torch.ones(site.in_features), is_input=True)
        return self.in_order(backbone)

    def know(self, backbone: Backbone) -> None:
        """Notes what PEFT's format needs of the backbone: its task type and its modules' widths."""
        self.task_type = TASK_TYPES[backbone.family]
        self.widths = {s.module: s.out_features for s in backbone.sites.values() if s.rows is None}

    def add_site(self, site: Site, factors: Tensor, *, is_input: bool) -> None:
        """Puts one site's factors ``[features]`` into the brick."""
        self.factors[parameter_name(site.name)] = nn.Parameter(factors.float())
        self.built_for[site.name] = site
        if is_input:
            self.scaled_inputs.add(site.name)

    def in_order(self, backbone: Backbone) -> Self:
        """The brick on the backbone's device, its sites in the backbone's order."""
        self.site_names = tuple(name for name in backbone.sites if name in self.built_for)
        return self.to(backbone.device)

    def plugs(self) -> Iterable[In | Out]:
        """One plug for each site, on its input or its output."""
        for name in self.site_names:
            factors = self.factors[parameter_name(name)]
            if name in self.scaled_inputs:
                yield In(name, functools.partial(_scale_input, factors))
            else:
                yield Out(name, functools.partial(_scale_output, factors))

    def interface(self) -> dict[str, Any]:
        """Kind, hyper-parameters, sites; and which slices of a module are one vector on disk."""
        slices: dict[str, list[str]] = {}
        for name in self.site_names:
            site = self.built_for[name]
            if site.rows is not None:
                slices.setdefault(site.module, []).append(name)
        return {**super().interface(), **({"slices": slices} if slices else {})}

    def body_files(self) -> dict[str, bytes]:
        """``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT writes them."""
        vectors: dict[str, Tensor] = {}
        for name in self.site_names:
            site, factors = self.built_for[name], self.factors[parameter_name(name)].detach().cpu()
            if name in self.scaled_inputs:
                vectors[site.module] = factors[None, :]
                continue
            whole = vectors.setdefault(site.module, torch.ones(self.widths[site.module], 1))
            whole[rows_in(site, len(whole)), 0] *= factors
        forward = sorted(self.built_for[name].module for name in self.scaled_inputs)
        config = {
            "peft_type": "IA3",
            "task_type": self.task_type,
            "base_model_name_or_path": None,
            "inference_mode": True,
            "target_modules": sorted(vectors),
            "feedforward_modules": forward,
            "fan_in_fan_out": any(site.transposed for site in self.built_for.values()),
        }
        tensors = {f"{PREFIX}{m}{SUFFIX}": v.contiguous() for m, v in vectors.items()}
        return {CONFIG_FILE: json_bytes(config), TENSOR_FILE: save(tensors)}

    @classmethod
    def restore(
        cls, interface: Mapping[str, Any], files: Mapping[str, bytes], backbone: Backbone
    ) -> Self:
        """A brick from PEFT's two files, trained here or anywhere else.

        Raises:
            UserError: a feature we do not compute, a tensor without a site, a shape that differs.
        """
        config = json.loads(files[CONFIG_FILE])
        check_computed("ia3", config, f"for '{backbone.id}'")
        brick = cls(**(interface.get("hyper") or {"sites": [], "inputs": [], "layers": None}))
        brick.know(backbone)
        tensors = load(files[TENSOR_FILE])
        for name in tensors.keys() - set(aside_tensors(config, tensors)):
            if not name.endswith(SUFFIX):
                raise UserError(
                    f"The adapter holds the tensor '{name}', which is no part of an IA3."
                )
            site = find_site(backbone, name.removeprefix(PREFIX).removesuffix(SUFFIX))
            vector = tensors[name]
            if vector.shape not in ((1, site.in_features), (site.out_features, 1)):
                raise UserError(
                    f"The adapter's '{name}' has shape {tuple(vector.shape)}, but '{site.module}' "
                    f"maps {site.in_features} to {site.out_features} features."
                )
            is_input = vector.shape[0] == 1
            slices = (interface.get("slices") or {}).get(site.module)
            for part in [site] if slices is None else [backbone.sites[s] for s in slices]:
                own = vector[0] if is_input else vector[rows_in(part, len(vector)), 0]
                brick.add_site(part, own, is_input=is_input)
        return brick.in_order(backbone)


def scale(values: Tensor, factors: Tensor) -> Tensor:
    """``factors ⊙ values`` in the dtype of ``values``.

    Args:
        values: ``[batch, seq, features]``.
        factors: ``[features]`` float32.
    """
    # bfloat16 knows nothing between 1 and 1.008: a rounded factor would stand still for long.
    return torch.addcmul(values, values, (factors - 1).to(values.dtype))


def _scale_input(factors: Tensor, call: Call) -> Tensor:
    return scale(call.x, factors)


def _scale_output(factors: Tensor, call: Call) -> Tensor:
    assert call.y is not None
    return scale(call.y, factors)
