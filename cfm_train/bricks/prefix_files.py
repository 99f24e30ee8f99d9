"""Prefixes and cartridges in PEFT's format: one row of numbers for each virtual token.

    prompt_embeddings [tokens, layers · 2 · kv_heads · head_dim]     layer 0 keys, layer 0 values, …

PEFT gives the decoder of an encoder-decoder another order: it lays the layers out twice and deals
them out by fours (keys, values, and two for cross-attention that it then throws away), so layer l
holds what is stored under 2 l mod L. With an even number of layers half of them share their
prefix; one that does not is beyond the format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cfm_train.backbone.sites import AttentionSite
from cfm_train.bricks import prompt_files
from cfm_train.errors import UserError
from cfm_train.library.peft_format import CONFIG_FILE

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone

States = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Layout:
    """Where PEFT stores the prefix of each site.

    Attributes:
        sites: names of the sites, by layer.
        stored: the number of the stored layer for each of them.
        family: the backbone's.
        heads: key and value heads of every site.
        width: width of one head.
    """

    sites: tuple[str, ...]
    stored: tuple[int, ...]
    family: str
    heads: int
    width: int

    def flatten(self, states: Mapping[str, States]) -> Tensor | None:
        """The prefix as PEFT stores it ``[tokens, …]``; None where the format cannot say it."""
        tokens = len(states[self.sites[0]][0])
        flat = torch.zeros(tokens, len(self.sites), 2, self.heads, self.width)
        for site, layer in zip(self.sites, self.stored, strict=True):
            for which, part in enumerate(states[site]):
                if part.shape != flat[:, layer, which].shape:
                    return None
                flat[:, layer, which] = part.detach().cpu()
        same = all(
            torch.equal(flat[:, layer, which], part.detach().cpu())
            for site, layer in zip(self.sites, self.stored, strict=True)
            for which, part in enumerate(states[site])
        )
        return flat.flatten(1) if same else None

    def write(self, flat: Tensor, peft_type: str, **more: Any) -> dict[str, bytes]:
        """The two files of a prefix that `flatten` gave.

        Args:
            flat: the prefix.
            peft_type: ``PREFIX_TUNING`` or ``CARTRIDGE``.
            **more: keys that the type's config has beyond the shape.
        """
        shape = {
            "token_dim": self.heads * self.width,
            "num_attention_heads": self.heads,
            "num_layers": len(self.sites),
        }
        submodules = 2 if self.family == "encoder-decoder" else 1
        return prompt_files.write(peft_type, self.family, flat, {**shape, **more}, submodules)

    def states(self, flat: Tensor) -> dict[str, States]:
        """Keys and values by site from what PEFT stored ``[tokens, …]``."""
        parts = flat.view(len(flat), len(self.sites), 2, self.heads, self.width)
        return {
            site: (parts[:, layer, 0].contiguous(), parts[:, layer, 1].contiguous())
            for site, layer in zip(self.sites, self.stored, strict=True)
        }


def layout_of(sites: tuple[str, ...], backbone: Backbone) -> Layout | None:
    """PEFT's layout of a prefix; None where it has other sites than PEFT would give it."""
    layout = peft_layout(backbone)
    return layout if layout is not None and sites == layout.sites else None


def peft_layout(backbone: Backbone) -> Layout | None:
    """The layout of PEFT's own prefixes on a backbone; None where its layers differ in shape."""
    stack = "decoder." if backbone.family == "encoder-decoder" else ""
    names = [f"{stack}layer.{i}.attn" for i in range(backbone.sites.layers[stack])]
    found = [backbone.sites[name] for name in names if name in backbone.sites]
    sites = [site for site in found if isinstance(site, AttentionSite) and site.kv]
    if len(sites) != len(names) or len({(s.kv_heads, s.head_dim) for s in sites}) != 1:
        return None
    count = len(sites)
    stored = [2 * i % count if stack else i for i in range(count)]
    return Layout(
        tuple(names), tuple(stored), backbone.family, sites[0].kv_heads, sites[0].head_dim
    )


def read_states(
    files: Mapping[str, bytes], backbone: Backbone
) -> tuple[dict[str, States], dict[str, Any]]:
    """Keys and values by site from PEFT's two files, and the config in one of them.

    Raises:
        UserError: another kind of adapter, or one for a model of another shape.
    """
    cartridge = json.loads(files[CONFIG_FILE]).get("peft_type") == "CARTRIDGE"
    config, flat = prompt_files.read_adapter(
        files, "cartridge" if cartridge else "prefix", backbone
    )
    layout = peft_layout(backbone)
    wanted = None if layout is None else 2 * len(layout.sites) * layout.heads * layout.width
    if layout is None or flat.shape[1] != wanted or config["num_layers"] != len(layout.sites):
        raise UserError(
            f"The prefix has {flat.shape[1]} numbers for each token and {config['num_layers']} "
            f"layers, but the backbone '{backbone.id}' takes {wanted}: it was trained on another "
            "model."
        )
    return layout.states(flat), config
