"""Placeholders: token ids that stand for what is no text, replaced before anything is embedded.

    ids         [ 5   9  -2  -2  -2   7 ]      -2: a sentinel, no id of the vocabulary
    embeddings  [ e5  e9  v1  v2  v3  e7 ]     v: from a connector, given with the batch

The frozen embedding is never resized. A pass without placeholders is left exactly as it is: its
embeddings are the backbone's own, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cfm_train.backbone.plugs import Tokens
from cfm_train.backbone.virtual import Weight, group
from cfm_train.errors import UserError


@dataclass(slots=True)
class Placeholders:
    """What is plugged in place of the placeholders of one stack."""

    plugs: list[tuple[Tokens, Tensor | None]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.plugs)

    def add(self, plug: Tokens, weight: Weight) -> None:
        """Takes one brick's tokens in.

        Raises:
            UserError: the weight is neither 0 nor 1, or another brick has the same sentinel.
        """
        probe = group((torch.zeros(1, 1),), weight)
        if probe is not None and probe.graded:
            raise UserError(
                "A modality brick is there for a row or it is not: give it one weight for each "
                "row, 0 or 1."
            )
        if any(other.sentinel == plug.sentinel for other, _ in self.plugs):
            raise UserError(
                "Two modality bricks have the same placeholder: give each one of its own before "
                "they are plugged (`Modality.sentinel`)."
            )
        rows = torch.zeros(1, dtype=torch.bool) if probe is None else probe.rows
        self.plugs.append((plug, rows))

    def clear(self) -> None:
        """Takes all out."""
        self.plugs = []

    def embedded(self, ids: Tensor, embed: nn.Module) -> Tensor | None:
        """The embeddings of ids with placeholders; None where there is no placeholder among them.

        Args:
            ids: ``[batch, seq]`` int64.
            embed: the module that embeds token ids.

        Returns:
            ``[batch, seq, hidden]`` in the dtype of the embedding.

        Raises:
            UserError: a placeholder that no brick stands for, or not as many as there are tokens.
        """
        held = ids < 0
        if not bool(held.any()):
            return None
        embedded: Tensor = embed(ids.masked_fill(held, 0))
        for plug, rows in self.plugs:
            here = ids == plug.sentinel
            if not bool(here.any()):
                continue
            if rows is not None and bool(here.any(dim=1).cpu()[~_spread(rows, len(ids))].any()):
                raise UserError(
                    "A row has placeholders of a modality brick that is not plugged for it: give "
                    "the brick weight 1 there, or leave them out."
                )
            tokens, counts = plug.read()
            tokens = _repeated(tokens, counts, len(ids))
            found = here.sum(dim=1).tolist()
            wanted = [c for c in counts for _ in range(max(1, len(ids) // max(1, len(counts))))]
            if found != wanted:
                raise UserError(
                    f"The rows have {found} placeholders, but their items give {wanted} tokens: "
                    "take the brick the batch before the pass (`Slots.take`)."
                )
            embedded = embedded.masked_scatter(
                here[..., None], tokens.to(embedded.device, embedded.dtype)
            )
            held = held & ~here
        if bool(held.any()):
            raise UserError(
                f"No plugged brick stands for the placeholder {int(ids[held][0])}: plug the "
                "modality brick in that the text was written for."
            )
        return embedded

    def watch(self, ids: Tensor | None, past: int) -> None:
        """Tells the plugs that ask for it of a pass that begins, see `plugs.Tokens`."""
        for plug, _ in self.plugs:
            if plug.watch is not None:
                plug.watch(None if ids is None else ids == plug.sentinel, past)


def _spread(rows: Tensor, batch: int) -> Tensor:
    return rows.repeat_interleave(batch // len(rows)) if len(rows) else rows


def _repeated(tokens: Tensor, counts: list[int], batch: int) -> Tensor:
    """Every row's tokens as often as generation repeats the row."""
    if not counts or batch == len(counts) or batch % len(counts):
        return tokens
    times = batch // len(counts)
    return torch.cat([part for row in tokens.split(counts) for part in [row] * times])
