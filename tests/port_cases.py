"""What the tests of the ports share: prompts and prefixes that stand for typed text.

The oracle is the model itself. A prompt made of the embeddings of real tokens, or a prefix made of
the keys and values that real tokens leave behind, must give what typing those tokens gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cfm_train.backbone.load import Backbone
from cfm_train.backbone.plugs import KV, Plug, Prompt
from cfm_train.backbone.sites import AttentionSite
from tests.backbones import VOCABULARY, answers

DECODERS = ("llama", "gpt2")
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


class Plugs:
    """The least that a slot needs of a brick."""

    def __init__(self, *plugs: Plug) -> None:
        self._plugs = plugs

    def plugs(self) -> Iterable[Plug]:
        return self._plugs


def tokens(rows: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def embed_site(backbone: Backbone) -> str:
    return "encoder.embed" if backbone.family == "encoder-decoder" else "embed"


def prompt_of(backbone: Backbone, text: Tensor) -> Plugs:
    """A prompt that stands for ``text``, token ids ``[tokens]``."""
    site = embed_site(backbone)
    table = backbone.model.get_submodule(backbone.sites[site].module)
    return Plugs(Prompt(site, table(text[None])[0]))


def random_prefix(
    backbone: Backbone, length: int, seed: int, sites: str = "attn", *, shared: bool = False
) -> Plugs:
    generator = torch.Generator().manual_seed(seed)
    return Plugs(
        *(
            KV(
                site.name,
                torch.randn(length, site.kv_heads, site.head_dim, generator=generator),
                torch.randn(length, site.kv_heads, site.head_dim, generator=generator),
                shared=shared,
            )
            for site in backbone.sites.select([sites])
            if isinstance(site, AttentionSite)
        )
    )


def recorded_prefix(backbone: Backbone, inputs: dict[str, Tensor], cut: dict[str, int]) -> Plugs:
    """Keys and values of the first tokens of each stack (``cut``: how many), from a whole pass."""
    names = [s.name for s in backbone.sites.values() if s.kind == "attention"]
    with backbone.slots.recording(names) as noted, torch.inference_mode():
        answers(backbone, inputs)
    plugs = []
    for name, (keys, values) in noted.items():
        stack = "encoder." if name.endswith(".cross") else backbone.sites[name].stack
        front = slice(0, cut[stack])
        if cut[stack]:
            parts = [part[0, :, front].transpose(0, 1).clone() for part in (keys, values)]
            plugs.append(KV(name, parts[0], parts[1]))
    return Plugs(*plugs)


def run(
    backbone: Backbone, inputs: dict[str, Tensor], *bricks: Plugs, weights: Any = None
) -> Tensor:
    with backbone.slots.plugged(bricks, weights), torch.inference_mode():
        return answers(backbone, inputs)
