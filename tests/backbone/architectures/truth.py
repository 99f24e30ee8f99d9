"""What is known of an architecture, and how its table of sites is put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Place = str | tuple[str, tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class Architecture:
    """A tiny random model and the truth about it.

    Attributes:
        auto: the class that makes it from a config.
        config: makes the config.
        layer: sites of each layer, ``{i}`` for its number.
        around: all other sites.
        heads: query heads, key-value heads, head size.
        kv: whether keys and values can be plugged into its attention.
        layers: number of layers (of each stack).
    """

    auto: Any
    config: Callable[[], Any]
    layer: dict[str, Place]
    around: dict[str, Place]
    heads: tuple[int, int, int] = (4, 4, 8)
    kv: bool = True
    layers: int = 2

    def expected(self) -> dict[str, Place]:
        """Every site by its full name."""
        sites = dict(self.around)
        for number in range(self.layers):
            for name, place in self.layer.items():
                where, rows = (place, None) if isinstance(place, str) else place
                where = where.format(i=number)
                name = name.format(i=number)
                sites[name] = where if rows is None else (where, rows)
        return sites


def in_layers(prefix: str, sites: dict[str, Place], stack: str = "") -> dict[str, Place]:
    """Sites of one layer by their full names, the layer itself among them.

    Args:
        prefix: the layer's module.
        sites: names and modules within the layer.
        stack: ``encoder.`` or ``decoder.`` where there are two.
    """

    def moved(tail: str) -> str:
        return f"{prefix}.{tail}".rstrip(".")

    return {
        f"{stack}layer.{{i}}.{name}".rstrip("."): moved(place)
        if isinstance(place, str)
        else (moved(place[0]), place[1])
        for name, place in {"": "", **sites}.items()
    }


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


def fused(
    module: str, q: Any = ((0, 32),), k: Any = ((32, 64),), v: Any = ((64, 96),)
) -> dict[str, Place]:
    """Queries, keys and values as rows of one projection."""
    return {
        "attn.q": (module, q),
        "attn.k": (module, k),
        "attn.v": (module, v),
        "attn.qkv": module,
    }
