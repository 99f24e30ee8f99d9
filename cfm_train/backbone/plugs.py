"""Plugs: what a brick puts into a slot of the backbone.

    Together out += …, all bricks in one call  (LoRA, DoRA: `bricks/bank.py`)
    Out      out  = fn(call)                   (IA3, adapters, biases, task vectors, PEFT's layers)
    In       x    = fn(call)                   (IA3 on the feed-forward's input)
    KV       attention sees extra keys, values (prefix tuning, cartridges; see `attention.py`)
    Prompt   virtual tokens before the input   (soft prompts; see `prompts.py`)
    Tokens   embeddings in place of placeholders (images, sounds; see `placeholders.py`)

A brick names them in `plugs`; `slots.py` puts them where they belong.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from cfm_train.backbone.sites import Site, SiteMap
from cfm_train.backbone.virtual import Members, Source, Weight


class Together(abc.ABC):
    """A plug of which all at one module run in one call before the others (`bank.LowRank`)."""

    site: str

    @staticmethod
    @abc.abstractmethod
    def run(
        sites: SiteMap,
        module: nn.Module,
        x: Tensor,
        base: Tensor,
        entries: Sequence[tuple[Any, Weight]],
    ) -> Tensor:
        """The module's output ``[batch, seq, out]`` with all entries applied to ``base``."""


@dataclass(slots=True)
class Call:
    """What an `Out` or `In` plug sees.

    Attributes:
        site: the site.
        module: the backbone's module (its parameters may be read, never written).
        x: the module's input ``[batch, seq, in_features]``.
        base: what the module itself answered, the site's part ``[batch, seq, out_features]``.
        y: the same after the plugs before this one; None on port ``in``.
        captured: inputs of the sites that a plug asked to see with ``reads``.
    """

    site: Site
    module: nn.Module
    x: Tensor
    base: Tensor | None
    y: Tensor | None
    captured: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Out:
    """Replaces a site's output by ``fn(call)``.

    ``reads`` names a site whose input is kept for it; ``alone`` refuses other bricks on the same
    rows of the site's module.
    """

    site: str
    fn: Callable[[Call], Tensor]
    reads: str | None = None
    alone: bool = False


@dataclass(frozen=True, slots=True)
class In:
    """Replaces a site's input by ``fn(call)``."""

    site: str
    fn: Callable[[Call], Tensor]


@dataclass(frozen=True, slots=True)
class KV:
    """Extra keys and values ``[tokens, kv_heads, head_dim]`` that an attention site sees first.

    Tensors, or functions that compute them anew in each pass. ``shift`` tells whether real tokens
    move up by that many positions, as if the extra ones stood before them in the cache (what PEFT
    does; it matters for rotary and learned positions, and never for a ``cross`` site). A relative
    position bias takes the extra ones for tokens right before the sequence. With ``shared`` the
    keys of several bricks lie at the same positions, not behind each other: tokens move by the
    longest, so that each is as far from them as if it were alone (parallel context windows, Ratner
    et al. 2023, arXiv 2212.10947). A relative bias takes each of them for tokens right before the
    sequence, and has no others beside them. ``members`` says pass by pass which rows of the batch
    have which of them; such keys have no positions.

    Raises:
        ValueError: ``members`` together with ``shift``, or ``shared`` without it.
    """

    site: str
    keys: Source
    values: Source
    shift: bool = True
    members: Members | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if self.shared and not self.shift:
            raise ValueError(f"'{self.site}': keys that move no token share no positions")
        if self.members is not None and self.shift:
            raise ValueError(f"'{self.site}': keys of some rows only move no token: shift=False")


@dataclass(frozen=True, slots=True)
class Prompt:
    """Virtual tokens ``[tokens, hidden]`` before the input embeddings of one stack (`embed` site).

    A tensor, or a function that computes it anew in each pass.
    """

    site: str
    embeddings: Source


@dataclass(frozen=True, slots=True)
class Tokens:
    """Embeddings in place of the placeholders among the token ids of one stack (`embed` site).

    ``sentinel`` is the placeholder's id: below zero, so that no vocabulary has it and a frozen
    embedding keeps its size. ``read`` is called in each pass that holds placeholders; it gives the
    embeddings ``[tokens, hidden]`` of all rows of the batch behind each other, and how many belong
    to each row. Rows of weight 0 must have no placeholder of this kind.

    ``watch`` is called as every pass begins, after ``read``: where the ids are this placeholder,
    bool ``[batch, seq]`` (None for a pass without ids), and how many tokens the cache holds.
    """

    site: str
    sentinel: int
    read: Callable[[], tuple[Tensor, list[int]]]
    watch: Callable[[Tensor | None, int], None] | None = None


Plug = Together | Out | In | KV | Prompt | Tokens


class Pluggable(Protocol):
    """What the slots need of a brick."""

    def plugs(self) -> Iterable[Plug]: ...
