"""LoRA, rsLoRA and DoRA bricks: low-rank updates of linear sites (arXiv 2106.09685).

    y = W x + b + (alpha / r) B A x             rsLoRA: alpha / sqrt(r)     (arXiv 2312.03732)
    DoRA: the adapted rows are scaled to a learned magnitude                (arXiv 2402.09353)

A starts as Kaiming-uniform noise, B as zero: a new brick changes nothing. The products run on the
bank (`bank.py`); on disk the brick is PEFT's own format (`lora_files.py`), and every parameter is
kept as PEFT stores it, so that a brick goes in and out without losing a bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from cfm_train.backbone.sites import Site
from cfm_train.bricks.bank import LowRank, bias_of, row_norms
from cfm_train.bricks.brick import Brick, linear_sites, parameter_name, some
from cfm_train.bricks.peft_modules import TASK_TYPES, overlap
from cfm_train.config.types import Positive, Rate, Share
from cfm_train.errors import UserError

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


@dataclass(frozen=True)
class Whole:
    """A fused module, of which a brick adapts parts.

    Attributes:
        width: its output features.
        magnitude: the norms of its weight's rows ``[width]`` for DoRA, else None.
        bias: its own bias ``[width]`` for ``bias=lora_only``, else None.
    """

    width: int
    magnitude: Tensor | None
    bias: Tensor | None


class LoRA(Brick):
    """A low-rank brick on any set of linear sites.

    Args:
        rank: rank of the update, at least 1.
        alpha: the update is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank)).
        dropout: probability of dropping an input feature while training.
        sites: patterns of linear sites, such as ``attn.q`` or ``ffn.down``.
        layers: numbers of the layers to use, negative ones from the top; None for all.
        rslora: scale by alpha / sqrt(rank).
        dora: learn each output row's magnitude apart from its direction.
        bias: ``lora_only`` learns the sites' own biases anew, ``lora_bias`` a bias of B (scaled
            like the update), ``none`` neither; PEFT's words.
    """

    def __init__(
        self,
        rank: Positive,
        alpha: Rate,
        dropout: Share,
        sites: list[str],
        layers: list[int] | None,
        rslora: bool,
        dora: bool,
        bias: Literal["none", "lora_only", "lora_bias"],
    ) -> None:
        super().__init__(
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            sites=sites,
            layers=layers,
            rslora=rslora,
            dora=dora,
            bias=bias,
        )
        if dora and bias == "lora_bias":
            raise UserError(
                "brick.bias=lora_bias does not go with brick.dora=true: a bias of B has no "
                "magnitude; choose lora_only or none."
            )
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.magnitude = nn.ParameterDict()
        self.bias = nn.ParameterDict()
        self.alphas: dict[str, float] = {}
        self.scales: dict[str, float] = {}
        self.built_for: dict[str, Site] = {}
        self.whole: dict[str, Whole] = {}
        self.task_type = "FEATURE_EXTRACTION"

    def build(self, backbone: Backbone) -> Self:
        """Makes A, B (and magnitude and bias) for every chosen site."""
        hyper = self.hyper
        self.task_type = TASK_TYPES[backbone.family]
        for site in some(linear_sites(backbone, hyper["sites"], hyper["layers"]), "sites"):
            module = backbone.model.get_submodule(site.module)
            A = torch.empty(hyper["rank"], site.in_features)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            B = torch.zeros(site.out_features, hyper["rank"])
            magnitude = row_norms(module, site) if hyper["dora"] else None
            own = bias_of(module, site)
            bias = None
            if hyper["bias"] == "lora_bias":
                bias = torch.zeros(site.out_features)
            elif hyper["bias"] == "lora_only" and own is not None:
                bias = own.clone()
            self.add_site(site, A, B, hyper["alpha"], magnitude, bias)
            self.know(backbone, site)
        return self.to(backbone.device)

    def add_site(
        self,
        site: Site,
        A: Tensor,
        B: Tensor,
        alpha: float,
        magnitude: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        """Puts one site's factors into the brick; ranks and alphas may differ from site to site.

        Args:
            site: the linear site.
            A: ``[rank, in_features]``.
            B: ``[out_features, rank]``.
            alpha: the site's alpha.
            magnitude: ``[out_features]`` for DoRA, else None.
            bias: ``[out_features]``, or None: the new bias for ``bias=lora_only``, else the bias of
                B, which the scale multiplies.
        """
        key = parameter_name(site.name)
        rank = A.shape[0]
        self.lora_A[key] = nn.Parameter(A.float())
        self.lora_B[key] = nn.Parameter(B.float())
        if magnitude is not None:
            self.magnitude[key] = nn.Parameter(magnitude.float())
        if bias is not None:
            self.bias[key] = nn.Parameter(bias.float())
        self.alphas[site.name] = alpha
        self.scales[site.name] = alpha / (math.sqrt(rank) if self.hyper["rslora"] else rank)
        self.built_for[site.name] = site
        self.site_names = (*self.site_names, site.name)

    def know(self, backbone: Backbone, site: Site) -> None:
        """Notes what a file for PEFT needs of the fused module that a site is a part of.

        Raises:
            UserError: two sites of the brick share output rows that DoRA or a bias would set twice.
        """
        if site.module in self.whole or site.rows is None:
            self._refuse_overlap(site)
            return
        module = backbone.model.get_submodule(site.module)
        entire = next(
            s for s in backbone.sites.values() if s.module == site.module and s.rows is None
        )
        own = bias_of(module, entire)
        self.whole[site.module] = Whole(
            entire.out_features,
            row_norms(module, entire) if self.hyper["dora"] else None,
            None if own is None or self.hyper["bias"] != "lora_only" else own.float().clone(),
        )
        self._refuse_overlap(site)

    def _refuse_overlap(self, site: Site) -> None:
        if not self.hyper["dora"] and self.hyper["bias"] != "lora_only":
            return
        for other in self.built_for.values():
            if other is not site and overlap(other, site):
                raise UserError(
                    f"The sites '{other.name}' and '{site.name}' share output rows of one module, "
                    "which DoRA and bias=lora_only would set twice: choose one of them."
                )

    def plugs(self) -> Iterable[LowRank]:
        """One low-rank plug for each site."""
        for site in self.site_names:
            key = parameter_name(site)
            yield LowRank(
                site=site,
                A=self.lora_A[key],
                B=self.lora_B[key],
                scale=self.scales[site],
                dropout=self.hyper["dropout"],
                magnitude=self.magnitude.get(key, None),
                bias=self.bias.get(key, None),
                bias_replaces=self.hyper["bias"] == "lora_only",
                brick=self,
            )

    def interface(self) -> dict[str, Any]:
        """Kind, hyper-parameters, sites; and which slices of a module are one adapter on disk."""
        from cfm_train.bricks.lora_files import slices_on_disk

        slices = slices_on_disk(self)
        return {**super().interface(), **({"slices": slices} if slices else {})}

    def body_files(self) -> dict[str, bytes]:
        """``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT writes them."""
        from cfm_train.bricks.lora_files import to_peft

        return to_peft(self)

    @classmethod
    def restore(
        cls, interface: Mapping[str, Any], files: Mapping[str, bytes], backbone: Backbone
    ) -> Self:
        """A brick from PEFT's files, trained here or anywhere else."""
        from cfm_train.bricks.lora_reading import from_peft

        return from_peft(cls, interface, files, backbone)
