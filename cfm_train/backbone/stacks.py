"""One stack of layers: what its input becomes where virtual tokens stand before it.

Two hooks on the module that turns token ids into hidden states. Before it runs, ids become
embeddings with the virtual ones in front, and mask, positions and token types grow with them; after
it, the virtual positions are taken off the hidden states, so that callers see the shapes they asked
for. An encoder that a decoder attends to keeps them, and the decoder's mask over it grows instead.

While a cache is being filled token by token, the virtual tokens are already in it: the cache
carries a note of them, and only mask and positions move. Nothing plugged, nothing done.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from cfm_train.backbone import masks, positions
from cfm_train.backbone.placeholders import Placeholders
from cfm_train.backbone.sites import Site
from cfm_train.backbone.virtual import Group, VirtualTokens, spread
from cfm_train.errors import UserError

#: The attribute in which a cache carries its `Note`.
NOTE = "_cfm_virtual"


@dataclass(frozen=True, slots=True)
class Note:
    """What a cache holds in front of the tokens that were generated.

    Attributes:
        seen: ``[rows, p]`` bool, its virtual tokens, False in a hole.
        mask: ``[rows, tokens]``, 1 for the real ones of the first pass; None where all are.
    """

    seen: Tensor
    mask: Tensor | None

    def lengthened(self, batch: int, length: int, device: torch.device) -> Tensor | None:
        """The mask after more tokens have come, all of them real: ``[batch, length]``."""
        if self.mask is None:
            return None
        mask = spread(self.mask, batch).to(device)
        return nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)


class Stack:
    """A stack of layers with its embedding, and the virtual tokens in front of it.

    Args:
        module: the stack's module, which takes ``input_ids`` or ``inputs_embeds``.
        embed: the module that embeds token ids.
        site: its `embed` site.
        causal: whether its tokens see only what is before them.

    Attributes:
        tokens: the plugged embeddings ``[tokens, hidden]``.
        items: what stands in place of placeholders among the token ids.
        moved: keys and values plugged in at the stack's attention sites, by site.
        shared: those of them that lie at the same positions, see `plugs.KV`.
        relative: the module that computes a relative position bias, None where there is none.
        past: how many tokens the cache held when the stack last began to run.
        keeps: whether virtual positions stay on the hidden states, for a decoder to attend to.
        feeds: the encoder's stack in front of a decoder.
    """

    def __init__(self, module: nn.Module, embed: nn.Module, site: Site, causal: bool) -> None:
        self.embed, self.site, self.causal = embed, site, causal
        self.tokens = VirtualTokens()
        self.moved: dict[str, list[Group]] = {}
        self.shared: dict[str, list[Group]] = {}
        self.items = Placeholders()
        self.parameters = list(inspect.signature(module.forward).parameters)
        self.table = positions.position_table(module, embed)
        self.relative = next(
            (m for m in module.modules() if getattr(m, "has_relative_attention_bias", False)), None
        )
        self.past = 0
        self.keeps = False
        self.feeds: Stack | None = None
        self._inserted: Note | None = None  # what the pass that is running has put in
        module.register_forward_pre_hook(self._before, with_kwargs=True)
        module.register_forward_hook(self._after)

    @property
    def takes_positions(self) -> bool:
        """Whether positions can be handed to the stack."""
        return "position_ids" in self.parameters

    def clear(self) -> None:
        """Empties the slot."""
        self.tokens.clear()
        self.items.clear()
        self.moved = {}
        self.shared = {}

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook: lengthens the stack's input."""
        kwargs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        cache = kwargs.get("past_key_values")
        noted: Note | None = getattr(cache, NOTE, None)
        across = self.feeds is not None and bool(self.feeds.tokens)
        ids = kwargs.get("input_ids")
        filled = self.items.embedded(ids, self.embed) if self.items and ids is not None else None
        if self.items:
            self.items.watch(ids, 0 if cache is None else int(cache.get_seq_length()))
        if filled is not None:
            kwargs |= {"input_ids": None, "inputs_embeds": filled}
        if not (self.tokens or self.moved or self.shared or noted is not None or across):
            return None if filled is None else ((), kwargs)
        some: Tensor = kwargs["inputs_embeds"] if ids is None else ids
        batch, length = some.shape[:2]
        self.past = 0 if cache is None else int(cache.get_seq_length())
        if noted is not None and not self.past:
            delattr(cache, NOTE)  # the cache has been emptied since
        seen = self._seen(noted, batch, some.device)
        inserted = seen is not None and not self.past
        before = self.past - (seen.shape[1] if seen is not None and not inserted else 0)
        mask = kwargs.get("attention_mask")
        if seen is not None and getattr(cache, "is_compileable", False):
            if noted is not None and not inserted:
                mask = noted.lengthened(batch, before + length, some.device)
            else:
                mask = masks.of_first_pass(mask, length)
        given = kwargs.get("position_ids")
        if self.takes_positions:
            own = given
            if own is None:
                own = positions.alone(ids, mask, length, before, self.table, some.device)
            kwargs["position_ids"] = positions.behind(
                own,
                seen,
                self._moves(batch),
                inserted=inserted,
                longest=length + before,
                table=self.table,
            )
        if seen is not None:
            kwargs["attention_mask"] = masks.with_virtual(
                mask,
                seen,
                inserted=inserted,
                real=length + before,
                causal=self.causal,
                packed=given if inserted else None,
            )
        if seen is not None and inserted:
            self._insert(kwargs, batch)
            flat = mask is not None and mask.ndim == 2
            self._inserted = Note(seen, mask if flat else None)
            _make_room(cache, seen.shape[1])
        if across and kwargs.get("encoder_hidden_states") is not None:
            self._look_across(kwargs)
        return (), kwargs

    def _seen(self, noted: Note | None, batch: int, device: torch.device) -> Tensor | None:
        """The virtual tokens of this pass or of its cache: ``[batch, p]`` bool, None for none.

        Raises:
            UserError: the cache was filled before the prompt was plugged in, or rows would need
                other numbers and the stack numbers its tokens itself.
        """
        if self.past:
            if self.tokens and noted is None:
                raise UserError(
                    "A prompt was plugged in after the cache had been filled without it: start the "
                    "generation anew with the brick in place."
                )
            return None if noted is None else spread(noted.seen, batch).to(device)
        if not self.tokens or not self.tokens.width(batch):
            return None
        uneven = self.tokens.layout(batch) is not None
        if uneven and not self.takes_positions and self.relative is None:
            raise UserError(
                f"The layers behind '{self.site.name}' number their tokens themselves, so rows "
                "with and without a prompt cannot share a batch: plug the prompt in for all rows."
            )
        return self.tokens.seen(batch, device)

    def _insert(self, kwargs: dict[str, Any], batch: int) -> None:
        """Replaces token ids by embeddings with the virtual ones in front."""
        ids = kwargs.get("input_ids")
        embedded: Tensor = kwargs["inputs_embeds"] if ids is None else self.embed(ids)
        virtual = self.tokens.gather(0, batch, embedded)
        if virtual.shape[-1] != embedded.shape[-1]:
            raise UserError(
                f"The prompt's embeddings have {virtual.shape[-1]} features, but the backbone's "
                f"have {embedded.shape[-1]}: the brick is of another backbone."
            )
        kwargs["input_ids"] = None
        kwargs["inputs_embeds"] = torch.cat([virtual, embedded], dim=1)
        if kwargs.get("token_type_ids") is not None:
            front = (virtual.shape[1], 0)
            kwargs["token_type_ids"] = nn.functional.pad(kwargs["token_type_ids"], front)

    def _moves(self, batch: int) -> Tensor:
        """By how many places keys at attention sites move each row's tokens: ``[batch]`` int64."""
        none = torch.zeros(batch, dtype=torch.int64)
        totals = [none]
        for site in {**self.moved, **self.shared}:
            behind = [_tokens_of(group, batch) for group in self.moved.get(site, ())]
            beside = [_tokens_of(group, batch) for group in self.shared.get(site, ())]
            totals.append(sum(behind, none) + torch.stack([none, *beside]).amax(dim=0))
        return torch.stack(totals).amax(dim=0)

    def _look_across(self, kwargs: dict[str, Any]) -> None:
        """Lengthens the mask over the encoder's states by its virtual tokens."""
        assert self.feeds is not None
        states: Tensor = kwargs["encoder_hidden_states"]
        mask: Tensor | None = kwargs.get("encoder_attention_mask")
        seen = self.feeds.tokens.seen(states.shape[0], states.device)
        real = states.shape[1] - seen.shape[1]
        if mask is None or mask.shape[-1] == real:
            kwargs["encoder_attention_mask"] = masks.with_virtual(
                mask, seen, inserted=False, real=real, causal=False
            )

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: takes the virtual positions off the hidden states."""
        note, self._inserted = self._inserted, None
        if note is None or self.keeps:
            return None
        p = note.seen.shape[1]
        for part in output if isinstance(output, tuple) else output.values():
            if isinstance(part, Cache):
                object.__setattr__(part, NOTE, note)
        if isinstance(output, tuple):
            return (output[0][:, p:], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, p:]
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(h[:, p:] for h in output.hidden_states)
        return output


def _tokens_of(group: Group, batch: int) -> Tensor:
    """How many of a group's tokens each row has: ``[batch]`` int64."""
    there = torch.ones(batch, dtype=torch.int64)
    return group.tokens * (there if group.rows is None else spread(group.rows, batch).long())


def _make_room(cache: Any, tokens: int) -> None:
    """Makes a cache of fixed size, still empty, large enough for virtual tokens as well."""
    own = getattr(cache, "self_attention_cache", cache)
    for layer in getattr(own, "layers", ()):
        if hasattr(layer, "max_cache_len") and not layer.is_initialized and not layer.is_sliding:
            layer.max_cache_len += tokens
