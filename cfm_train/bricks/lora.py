"""LoRA, rsLoRA and DoRA bricks: low-rank updates of linear sites (arXiv 2106.09685).

    y = W x + b + (alpha / r) B A x             rsLoRA: alpha / sqrt(r)     (arXiv 2312.03732)
    DoRA: the adapted rows are scaled to a learned magnitude                (arXiv 2402.09353)

A starts as Kaiming-uniform noise, B as zero: a new brick changes nothing. The products run on the
bank (`bank.py`); on disk the brick is PEFT's own format (`lora_files.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from cfm_train.backbone.sites import Site
from cfm_train.bricks.bank import LowRank, weight_of
from cfm_train.bricks.brick import Brick, linear_sites, parameter_name
from cfm_train.errors import UserError

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone

#: PEFT's name for what a backbone is used for.
TASK_TYPES = {
    "encoder": "FEATURE_EXTRACTION",
    "decoder": "CAUSAL_LM",
    "encoder-decoder": "SEQ_2_SEQ_LM",
}


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
    """

    def __init__(
        self,
        rank: int,
        alpha: float,
        dropout: float,
        sites: list[str],
        layers: list[int] | None,
        rslora: bool,
        dora: bool,
    ) -> None:
        super().__init__(
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            sites=sites,
            layers=layers,
            rslora=rslora,
            dora=dora,
        )
        if rank < 1:
            raise UserError(f"brick.rank is {rank}, but a low-rank brick needs a rank of at least 1.")
        if not 0 <= dropout < 1:
            raise UserError(f"brick.dropout is {dropout}, but a probability below 1 is needed.")
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.magnitude = nn.ParameterDict()
        self.bias = nn.ParameterDict()
        self.scales: dict[str, float] = {}
        self.built_for: dict[str, Site] = {}
        self.widths: dict[str, int] = {}
        self.task_type = "FEATURE_EXTRACTION"

    def build(self, backbone: Backbone) -> Self:
        """Makes A, B (and the magnitude) for every chosen site."""
        hyper = self.hyper
        self.know(backbone)
        for site in linear_sites(backbone, hyper["sites"], hyper["layers"]):
            A = torch.empty(hyper["rank"], site.in_features)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            B = torch.zeros(site.out_features, hyper["rank"])
            magnitude = None
            if hyper["dora"]:
                module = backbone.model.get_submodule(site.module)
                magnitude = weight_of(module, site).detach().float().norm(dim=1)
            self.add_site(site, A, B, hyper["alpha"], magnitude, None)
        return self.to(backbone.device)

    def know(self, backbone: Backbone) -> None:
        """Notes what PEFT's format needs of the backbone: its task type and its modules' widths."""
        self.task_type = TASK_TYPES[backbone.family]
        for site in backbone.sites.values():
            if site.kind in ("linear", "conv1d") and site.rows is None:
                self.widths[site.module] = site.out_features

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
            bias: ``[out_features]`` added to the output, else None.
        """
        key = parameter_name(site.name)
        rank = A.shape[0]
        self.lora_A[key] = nn.Parameter(A.float())
        self.lora_B[key] = nn.Parameter(B.float())
        if magnitude is not None:
            self.magnitude[key] = nn.Parameter(magnitude.float())
        if bias is not None:
            self.bias[key] = nn.Parameter(bias.float())
        self.scales[site.name] = alpha / (math.sqrt(rank) if self.hyper["rslora"] else rank)
        self.built_for[site.name] = site
        self.site_names = (*self.site_names, site.name)

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
                magnitude=self.magnitude[key] if key in self.magnitude else None,
                bias=self.bias[key] if key in self.bias else None,
                brick=self,
            )

    def delta(self, site: str) -> Tensor:
        """The dense update ``scale * B A`` of a site, ``[out_features, in_features]`` float32."""
        key = parameter_name(site)
        return self.scales[site] * (self.lora_B[key] @ self.lora_A[key])

    def interface(self) -> dict[str, Any]:
        """Kind, hyper-parameters and sites; and which slices of a fused module are one adapter on disk."""
        from cfm_train.bricks.lora_files import slices_by_module

        slices = {
            module: names
            for module, names in slices_by_module(self).items()
            if self.built_for[names[0]].rows is not None
        }
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
        from cfm_train.bricks.lora_files import from_peft

        return from_peft(cls, interface, files, backbone)
