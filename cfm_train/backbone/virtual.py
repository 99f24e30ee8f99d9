"""Virtual tokens: which rows of a batch carry which, and where they lie.

Soft prompts and prefixes put tokens in front of a sequence that nobody typed. Several bricks may do
so at once, with different lengths and another brick for every row. Each row's virtual tokens lie
right before its own first token, in the order of the plan; shorter rows have holes in front:

    row 0   [ .  .  a  a | tokens ]        brick a on rows 0 and 2
    row 1   [ .  b  b  b | tokens ]        brick b on rows 1 and 2
    row 2   [ a  a  b  b … | tokens ]      (here as wide as a and b together)

A hole is masked, so that a row equals its solo run; the width is that of the longest row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cfm_train.errors import UserError

#: A brick's share in a plan: all of it (None), a number, a tensor ``[batch]`` or ``[batch, seq]``.
Weight = float | Tensor | None

#: A tensor, or what computes it; called in each forward pass, so that gradients reach its inputs.
Source = Tensor | Callable[[], Tensor]

#: Tells for a batch of that size which tokens each row has, ``[batch, tokens]`` bool.
Members = Callable[[int], Tensor]


def read(source: Source) -> Tensor:
    """The tensor of a source."""
    return source if isinstance(source, Tensor) else source()


def length_of(source: Source) -> int:
    """How many virtual tokens a source holds: its first dimension."""
    with torch.no_grad():
        return len(read(source))


def spread(rows: Tensor, batch: int) -> Tensor:
    """Values ``[rows, …]`` for a batch in which generation repeats every row: ``[batch, …]``.

    Raises:
        UserError: the batch is no multiple of the rows.
    """
    if rows.shape[0] == batch:
        return rows
    if batch % rows.shape[0]:
        raise UserError(
            f"The plan has weights for {rows.shape[0]} rows, but the batch has {batch}: plug the "
            "bricks again with one weight for each row."
        )
    return rows.repeat_interleave(batch // rows.shape[0], dim=0)


@dataclass(frozen=True, slots=True)
class Group:
    """The virtual tokens of one brick.

    Attributes:
        sources: tensors ``[tokens, …]``: embeddings, or keys and values.
        tokens: how many there are.
        weight: the brick's weight.
        rows: ``[rows]`` bool on the CPU, which rows carry them; None for all.
        graded: whether the weight says more than there or not there.
        members: which of the tokens each row has in this pass, ``[batch, tokens]`` bool for a batch
            of that size; None for all.
    """

    sources: tuple[Source, ...]
    tokens: int
    weight: Weight
    rows: Tensor | None
    graded: bool
    members: Members | None = None

    def there(self, batch: int) -> Tensor | None:
        """Which rows have which tokens: ``[batch]`` or ``[batch, tokens]`` bool, None for all."""
        if self.members is None:
            return self.rows
        own = self.members(batch)
        return own if self.rows is None else own & spread(self.rows, batch)[:, None]


def group(
    sources: tuple[Source, ...], weight: Weight, members: Members | None = None
) -> Group | None:
    """The group of one brick; None where its weight is zero everywhere.

    Raises:
        UserError: a weight below zero.
    """
    tokens = length_of(sources[0])
    if not isinstance(weight, Tensor):
        _refuse_negative(weight is not None and weight < 0)
        if weight == 0:
            return None
        return Group(sources, tokens, weight, None, weight not in (None, 1), members)
    values = weight.detach().to("cpu")
    _refuse_negative(bool((values < 0).any()))
    there = values != 0
    rows = there if there.ndim == 1 else there.any(dim=1)
    if not bool(rows.any()):
        return None
    graded = values.ndim == 2 or bool(((values != 0) & (values != 1)).any())
    return Group(sources, tokens, weight, None if bool(rows.all()) else rows, graded, members)


def _refuse_negative(negative: bool) -> None:
    if negative:
        raise UserError(
            "A brick of virtual tokens has a weight below zero: use 0 to leave it out, 1 to have "
            "it, and for keys and values other numbers to have them seen more or less."
        )


@dataclass(slots=True)
class VirtualTokens:
    """The virtual tokens of one slot, of all bricks in the plan."""

    groups: list[Group] = field(default_factory=list)
    _layouts: dict[int, Tensor | None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.groups)

    def add(self, added: Group) -> None:
        """Puts one brick's tokens behind those that are there."""
        self.groups.append(added)
        self._layouts.clear()

    def clear(self) -> None:
        """Takes all tokens out."""
        self.groups = []
        self._layouts.clear()

    def layout(self, batch: int) -> Tensor | None:
        """Which token lies where: ``[batch, width]`` int64 on the CPU, -1 in a hole.

        Tokens are numbered through all groups. None where every row carries every token.
        """
        # Who has which may change from pass to pass.
        if batch not in self._layouts or any(g.members is not None for g in self.groups):
            self._layouts[batch] = lay_out([(g.tokens, g.there(batch)) for g in self.groups], batch)
        return self._layouts[batch]

    def width(self, batch: int) -> int:
        """How many places the longest row needs."""
        places = self.layout(batch)
        return sum(g.tokens for g in self.groups) if places is None else places.shape[1]

    def seen(self, batch: int, device: torch.device) -> Tensor:
        """``[batch, width]`` bool: where there is a token, and no hole."""
        places = self.layout(batch)
        if places is None:
            return torch.ones(batch, self.width(batch), dtype=torch.bool, device=device)
        return (places >= 0).to(device)

    def holes(self, batch: int) -> Tensor:
        """How many holes each row has in front of its tokens: ``[batch]`` int64 on the CPU."""
        places = self.layout(batch)
        if places is None:
            return torch.zeros(batch, dtype=torch.int64)
        return (places < 0).sum(dim=1)

    def gather(self, source: int, batch: int, like: Tensor) -> Tensor:
        """One source of all groups, laid out: ``[batch, width, …]`` in the dtype of ``like``.

        Args:
            source: which of each group's sources.
            batch: rows of the batch.
            like: gives dtype and device.
        """
        parts = [read(g.sources[source]).to(like.device, like.dtype) for g in self.groups]
        tokens = parts[0] if len(parts) == 1 else torch.cat(parts)
        places = self.layout(batch)
        if places is None:
            return tokens.expand(batch, *tokens.shape)
        return tokens[places.clamp_min(0).to(like.device)]

    def log_weights(self, batch: int, queries: int, device: torch.device) -> Tensor | None:
        """What is added to attention scores so that a token counts as often as its weight says.

        softmax over ``score + log w`` gives each key w times its share: weight 1 changes nothing,
        and towards 0 the token vanishes.

        Returns:
            ``[batch, 1 or queries, width]`` float32; None where no weight is graded.

        Raises:
            UserError: token weights that do not fit the pass.
        """
        if not any(g.graded for g in self.groups):
            return None
        parts = []
        for g in self.groups:
            weight = g.weight if isinstance(g.weight, Tensor) else torch.tensor([g.weight or 1.0])
            weight = spread(weight.to(device, torch.float32), batch if len(weight) > 1 else 1)
            if weight.ndim == 2 and weight.shape[1] != queries:
                raise UserError(
                    f"The plan has weights for {weight.shape[1]} tokens, but the pass has {queries}"
                    ": token weights go with one pass over whole sequences, row weights with any."
                )
            weight = weight[:, None] if weight.ndim == 1 else weight  # [batch or 1, 1 or queries]
            smallest = torch.finfo(weight.dtype)
            log = weight.clamp_min(smallest.tiny).log().masked_fill(weight == 0, smallest.min)
            parts.append(log[..., None].expand(-1, -1, g.tokens))
        queries = max(part.shape[1] for part in parts)
        total = torch.cat([part.expand(batch, queries, -1) for part in parts], dim=-1)
        places = self.layout(batch)
        if places is None:
            return total
        index = places.clamp_min(0).to(device)[:, None].expand(-1, queries, -1)
        return total.gather(2, index)


def lay_out(groups: Sequence[tuple[int, Tensor | None]], batch: int) -> Tensor | None:
    """Places of virtual tokens, see `VirtualTokens.layout`.

    Args:
        groups: (tokens, rows that carry them) of each group: ``[batch]``, ``[batch, tokens]``, or
            None for all rows.
        batch: rows of the batch.
    """
    if all(rows is None for _, rows in groups):
        return None
    there = torch.cat(
        [_spread_out(rows, tokens, batch) for tokens, rows in groups],
        dim=1,
    )  # [batch, all tokens]
    width = int(there.sum(dim=1).max())
    # A stable sort brings what is absent to the front and leaves the rest in the plan's order.
    order = there.int().argsort(dim=1, stable=True)[:, there.shape[1] - width :]
    return torch.where(there.gather(1, order), order, -1)


def _spread_out(rows: Tensor | None, tokens: int, batch: int) -> Tensor:
    """Which rows have which of a group's tokens: ``[batch, tokens]`` bool."""
    if rows is None:
        return torch.ones(batch, tokens, dtype=torch.bool)
    rows = spread(rows, batch)
    return rows if rows.ndim == 2 else rows[:, None].expand(-1, tokens)
