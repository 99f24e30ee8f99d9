"""P-tuning through PEFT's prompt encoder (Liu et al. 2021, arXiv 2103.10385).

Virtual tokens come out of a small network over embeddings of their own. The network is PEFT's; the
prompt slot of the backbone puts its tokens before the input, so it works on every family, and a row
of a batch may be without it. On disk are the finished tokens alone, as in PEFT: a restored prompt
needs its network no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from peft import PromptEncoder, PromptEncoderConfig
from torch import Tensor, nn

from cfm_train.backbone.plugs import Prompt
from cfm_train.bricks.peft_layers import peft_speaks
from cfm_train.errors import UserError

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.backbone.sites import Site

#: PEFT's name of the finished tokens.
KEY = "prompt_embeddings"


class VirtualPrompt(nn.Module):
    """PEFT's prompt encoder and the site that it feeds.

    Args:
        config: PEFT's config; its ``inference_mode`` says whether there is a network.
        backbone: the backbone.
        site: the embedding that the tokens come before.
    """

    def __init__(self, config: PromptEncoderConfig, backbone: Backbone, site: Site) -> None:
        super().__init__()
        with peft_speaks("p_tuning", backbone):
            self.encoder = PromptEncoder(config)
        self.config = config
        self.site_names = (site.name,)

    def tokens(self) -> Tensor:
        """The virtual tokens ``[tokens, hidden]`` float32."""
        weight: Tensor = self.encoder.embedding.weight
        if self.config.inference_mode:
            return weight
        made: Tensor = self.encoder(torch.arange(len(weight), device=weight.device)[None])
        return made[0]

    def plugs(self) -> Iterable[Prompt]:
        """The tokens, computed anew in each pass."""
        yield Prompt(self.site_names[0], self.tokens)

    def state(self) -> dict[str, Tensor]:
        """The finished tokens."""
        with torch.no_grad():
            return {KEY: self.tokens().detach().clone().contiguous()}

    def set_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the finished tokens.

        Raises:
            UserError: they are missing or of another shape.
        """
        own = self.encoder.embedding.weight
        if tensors.keys() != {KEY} or tensors[KEY].shape != own.shape:
            shapes = {name: tuple(value.shape) for name, value in tensors.items()}
            raise UserError(
                f"The adapter holds the tensors {shapes}, but the backbone takes '{KEY}' "
                f"{tuple(own.shape)}: it was made for another backbone."
            )
        with torch.no_grad():
            own.copy_(tensors[KEY])

    def penalty(self) -> Tensor | None:
        """Nothing is added to the loss."""
        return None

    def after_step(self, step: int, total: int) -> None:
        """Nothing to do."""


def prompt_site(backbone: Backbone, patterns: list[str], layers: list[int] | None) -> Site:
    """The embedding that a prompt comes before: of two stacks the encoder's, as in PEFT.

    Raises:
        UserError: the patterns choose no such embedding, or several.
    """
    chosen = [site for site in backbone.sites.select(patterns, layers) if site.kind == "embed"]
    if backbone.family == "encoder-decoder":
        chosen = [site for site in chosen if site.stack == "encoder."]
    if len(chosen) != 1:
        raise UserError(
            f"brick.sites={patterns} chooses {len(chosen)} embeddings of '{backbone.id}' that a "
            "P-tuning prompt may come before: write brick.sites=[embed]."
        )
    return chosen[0]
