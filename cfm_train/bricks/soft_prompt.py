"""Soft prompts: learned embeddings in front of the input (Lester et al. 2021, arXiv 2104.08691).

    input = [p_1 … p_n, e(x_1) … e(x_m)]         p learned, everything else frozen

The prompt starts as words drawn from the vocabulary, as a text that says what the task is, or as
noise; the paper compares such starts (its section 3.2: wide gaps in small models, none in the
largest). In an encoder-decoder it stands before the encoder, as in PEFT, whose format the brick has
on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from cfm_train.backbone.plugs import Prompt
from cfm_train.backbone.sites import AttentionSite
from cfm_train.bricks import prompt_files
from cfm_train.bricks.brick import Brick
from cfm_train.config.types import Positive, Text
from cfm_train.errors import UserError

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone

#: How many tokens are looked at to learn how embeddings are distributed.
SAMPLE = 4096


class SoftPrompt(Brick):
    """Virtual tokens before the input.

    Args:
        tokens: how many.
        init: ``vocabulary`` starts from the embeddings of random tokens, ``text`` from those of
            ``text``, ``random`` from a normal distribution with the embeddings' mean and deviation.
        text: what the prompt says at first, cut or repeated to its length; None without
            ``init=text``.
    """

    granularity: ClassVar[str] = "model"
    starts_as_identity: ClassVar[bool] = False

    def __init__(
        self, tokens: Positive, init: Literal["vocabulary", "text", "random"], text: Text | None
    ) -> None:
        super().__init__(tokens=tokens, init=init, text=text)
        self.family = ""
        self.shape: dict[str, int] = {}

    def build(self, backbone: Backbone) -> Self:
        """Makes the embeddings ``[tokens, hidden]``."""
        tokens, init = self.hyper["tokens"], self.hyper["init"]
        self.know(backbone)
        embed = backbone.model.get_submodule(backbone.sites[self.site_names[0]].module)
        ids = prompt_files.start_ids(
            backbone, SAMPLE if init == "random" else tokens, init, self.hyper["text"]
        )
        with torch.no_grad():
            start: Tensor = embed(ids).float()
        if init == "random":
            noise = torch.randn(tokens, start.shape[1], device=start.device)
            start = start.mean(dim=0) + start.std(dim=0) * noise
        self.embeddings = nn.Parameter(start)
        return self

    def know(self, backbone: Backbone) -> None:
        """Notes the site, and what PEFT's format needs of the backbone."""
        self.family = backbone.family
        stack = "encoder." if backbone.family == "encoder-decoder" else ""
        site = backbone.sites[f"{stack}embed"]
        self.site_names = (site.name,)
        heads = [s.heads for s in backbone.sites.values() if isinstance(s, AttentionSite)]
        self.shape = {
            "token_dim": site.out_features,
            "num_attention_heads": heads[0] if heads else 1,
            "num_layers": backbone.sites.layers[stack],
        }

    def plugs(self) -> Iterable[Prompt]:
        """One prompt."""
        yield Prompt(self.site_names[0], self.embeddings)

    def body_files(self) -> dict[str, bytes]:
        """``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT writes them."""
        return prompt_files.write("PROMPT_TUNING", self.family, self.embeddings, self.shape, 1)

    @classmethod
    def restore(
        cls, interface: Mapping[str, Any], files: Mapping[str, bytes], backbone: Backbone
    ) -> Self:
        """A brick from PEFT's two files, trained here or anywhere else.

        Raises:
            UserError: another kind of adapter, or embeddings of another width.
        """
        _, embeddings = prompt_files.read_adapter(files, cls.kind, backbone)
        plain = {"tokens": len(embeddings), "init": "vocabulary", "text": None}
        brick = cls(**(interface.get("hyper") or plain))
        brick.know(backbone)
        width = brick.shape["token_dim"]
        if embeddings.shape[1] != width:
            raise UserError(
                f"The prompt's embeddings have {embeddings.shape[1]} features, but the backbone "
                f"'{backbone.id}' has {width}: it was trained on another model."
            )
        brick.embeddings = nn.Parameter(embeddings.to(backbone.device))
        return brick
