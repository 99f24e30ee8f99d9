"""The embedding port: virtual tokens in front of a stack's input, and the positions they take.

A soft prompt lengthens the sequence, which no hook on one layer can do. The slot therefore sits on
the stack itself (the module that turns token ids into hidden states): before it runs, token ids become
embeddings with the virtual ones in front, and masks, positions and token types grow with them; after
it, the virtual positions are taken off the hidden states, so that callers see the shapes they asked
for. An encoder that a decoder attends to keeps them, and the decoder's mask over it grows instead.

While a cache is being filled token by token, the virtual tokens are already in it: the cache carries a
note of them, and only mask and positions move. Real tokens come after the virtual ones of their own
row: rows without a prompt keep their positions. Keys and values plugged into attention move positions
in the same way (`attention.py`), without ever lying in a cache.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from cfm_train.backbone import masks
from cfm_train.backbone.sites import Site, SiteMap
from cfm_train.backbone.virtual import Group, Source, VirtualTokens, Weight, group, spread
from cfm_train.errors import UserError

#: Where a cache notes the virtual tokens that it holds: ``[rows, width]`` bool.
NOTE = "_cfm_virtual"


class Stack:
    """One stack of layers with its embedding, and the virtual tokens in front of it.

    Args:
        module: the stack's module, which takes ``input_ids`` or ``inputs_embeds``.
        embed: the module that embeds token ids.
        site: its `embed` site.
        causal: whether its tokens see only what is before them.

    Attributes:
        tokens: the plugged embeddings ``[tokens, hidden]``.
        relative: the module that computes a relative position bias, None where there is none.
        past: how many tokens the cache held when the stack last began to run.
        keeps: whether virtual positions stay on the hidden states, for a decoder to attend to.
        feeds: the encoder's stack in front of a decoder.
    """

    def __init__(self, module: nn.Module, embed: nn.Module, site: Site, causal: bool) -> None:
        self.module, self.embed, self.site, self.causal = module, embed, site, causal
        self.tokens = VirtualTokens()
        self.moved: dict[str, list[Group]] = {}
        self.parameters = list(inspect.signature(module.forward).parameters)
        self.table = _position_table(module, embed)
        self.relative = next(
            (m for m in module.modules() if getattr(m, "has_relative_attention_bias", False)), None
        )
        self.past = 0
        self.keeps = False
        self.feeds: Stack | None = None
        self._inserted = self._batch = 0
        module.register_forward_pre_hook(self._before, with_kwargs=True)
        module.register_forward_hook(self._after)

    def clear(self) -> None:
        """Empties the slot."""
        self.tokens.clear()
        self.moved = {}

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook: lengthens the stack's input."""
        kwargs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        cache = kwargs.get("past_key_values")
        noted: Tensor | None = getattr(cache, NOTE, None)
        crossing = self.feeds is not None and bool(self.feeds.tokens)
        if not (self.tokens or self.moved or noted is not None or crossing):
            return None
        some = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        batch, length = some.shape[:2]
        self.past = int(cache.get_seq_length()) if cache is not None else 0
        seen: Tensor | None = None
        if self.past and noted is not None:
            seen = spread(noted, batch).to(some.device)
        elif self.past and self.tokens:
            raise UserError(
                "A prompt was plugged in after the cache had been filled without it: start the "
                "generation anew with the brick in place."
            )
        inserted = 0
        if not self.past and self.tokens:
            seen = self.tokens.seen(batch, some.device)
            inserted = seen.shape[1]
        positions = self._positions(kwargs, batch, length, seen, bool(inserted))
        if seen is not None:
            kwargs["attention_mask"] = masks.with_virtual(
                kwargs.get("attention_mask"),
                seen,
                inserted=bool(inserted),
                real=length + self.past - (0 if inserted else seen.shape[1]),
                causal=self.causal,
                packed=kwargs.get("position_ids") if inserted else None,
            )
        if inserted:
            self._insert(kwargs, batch)
            if cache is not None:
                _make_room(cache, inserted)
        if positions is not None:
            kwargs["position_ids"] = positions
        if crossing and kwargs.get("encoder_hidden_states") is not None:
            self._look_across(kwargs)
        self._inserted, self._batch = inserted, batch
        return (), kwargs

    def _insert(self, kwargs: dict[str, Any], batch: int) -> None:
        """Replaces token ids by embeddings with the virtual ones in front."""
        ids = kwargs.pop("input_ids", None)
        embedded: Tensor = kwargs["inputs_embeds"] if ids is None else self.embed(ids)
        virtual = self.tokens.gather(0, batch, embedded)
        if virtual.shape[-1] != embedded.shape[-1]:
            raise UserError(
                f"The prompt's embeddings have {virtual.shape[-1]} features, but the backbone's have "
                f"{embedded.shape[-1]}: the brick is of another backbone."
            )
        kwargs["input_ids"] = None
        kwargs["inputs_embeds"] = torch.cat([virtual, embedded], dim=1)
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = nn.functional.pad(
                kwargs["token_type_ids"], (virtual.shape[1], 0)
            )

    def _positions(
        self, kwargs: dict[str, Any], batch: int, length: int, seen: Tensor | None, inserted: bool
    ) -> Tensor | None:
        """``position_ids`` behind the virtual tokens; None where the stack takes none.

        Raises:
            UserError: the stack numbers its tokens itself, and rows would need other numbers; or there
                are more positions than the model has learned.
        """
        if "position_ids" not in self.parameters:
            uneven = seen is not None and self.tokens.layout(batch) is not None
            if uneven and self.relative is None and inserted:
                raise UserError(
                    f"The layers behind '{self.site.name}' number their tokens themselves, so rows with "
                    "and without a prompt cannot share a batch: plug the prompt in for all rows."
                )
            return None
        ids, own = kwargs.get("input_ids"), kwargs.get("position_ids")
        device = (kwargs["inputs_embeds"] if ids is None else ids).device
        # RoBERTa's kind of table counts real tokens, from behind the padding token's number.
        padding = None if self.table is None else self.table.padding_idx
        first = 0 if padding is None else padding + 1
        before = self.past - (seen.shape[1] if seen is not None and not inserted else 0)
        if own is None and padding is not None and ids is not None:
            real = ids.ne(padding).long()
            own = (real.cumsum(1) + before) * real + padding
        elif own is None:
            own = (torch.arange(length, device=device) + before + first)[None]
        moved = self._moved(batch).to(device)[:, None]
        if seen is None:
            positions = own + moved
        else:
            positions = own + moved + seen.sum(dim=1, keepdim=True)
            if inserted:
                virtual = (seen.cumsum(1) - 1).clamp_min(0) + moved + first
                virtual = virtual.expand(*positions.shape[:-1], -1)
                positions = torch.cat([virtual, positions], dim=-1)
        bound = self.past + length + first + int(moved.max()) + (seen.shape[1] if inserted else 0)
        if self.table is not None and bound > self.table.num_embeddings:
            self._check_positions(positions, length)
        return positions

    def _check_positions(self, positions: Tensor, length: int) -> None:
        """Refuses positions that the model has not learned (only called where they come close)."""
        assert self.table is not None
        most = self.table.num_embeddings
        if int(positions.max()) >= most:
            raise UserError(
                f"{length} tokens behind {int(positions.max()) + 1 - length} others are more than "
                f"the {most} positions that the backbone has learned: shorten the texts "
                "(data.max_length) or the prompt."
            )

    def _moved(self, batch: int) -> Tensor:
        """By how many places keys and values at attention sites move each row's tokens: ``[batch]``."""
        totals = [torch.zeros(batch, dtype=torch.int64)]
        for groups in self.moved.values():
            total = torch.zeros(batch, dtype=torch.int64)
            for g in groups:
                total = total + g.tokens * (1 if g.rows is None else spread(g.rows, batch).long())
            totals.append(total)
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
        inserted, self._inserted = self._inserted, 0
        if not inserted or self.keeps:
            return None
        seen = self.tokens.seen(self._batch, torch.device("cpu"))
        if isinstance(output, tuple):
            for part in output:
                if isinstance(part, Cache):
                    object.__setattr__(part, NOTE, seen)
            return (output[0][:, inserted:], *output[1:])
        if output.get("past_key_values") is not None:
            object.__setattr__(output.past_key_values, NOTE, seen)
        output.last_hidden_state = output.last_hidden_state[:, inserted:]
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(h[:, inserted:] for h in output.hidden_states)
        return output


class PromptSlot:
    """The embedding ports of a model, one for each stack.

    Args:
        model: the transformers model.
        sites: its sites; a stack is the nearest module above an `embed` site that takes embeddings.
    """

    def __init__(self, model: nn.Module, sites: SiteMap) -> None:
        self.stacks: dict[str, Stack] = {}
        for site in sites.values():
            module = _stack_module(model, site) if site.kind == "embed" else None
            if module is not None and site.stack not in self.stacks:
                embed = model.get_submodule(site.module)
                causal = any(
                    bool(getattr(model.get_submodule(s.module), "is_causal", False))
                    for s in sites.values()
                    if s.kind == "attention" and s.stack == site.stack
                )
                self.stacks[site.stack] = Stack(module, embed, site, causal)
        encoder, decoder = self.stacks.get("encoder."), self.stacks.get("decoder.")
        if encoder is not None and decoder is not None:
            encoder.keeps, decoder.feeds = True, encoder
            model.register_forward_hook(_cut_encoder_states, with_kwargs=True)

    def clear(self) -> None:
        """Takes every virtual token out."""
        for stack in self.stacks.values():
            stack.clear()

    def add(self, site: Site, embeddings: Source, weight: Weight) -> None:
        """Puts virtual tokens ``[tokens, hidden]`` in front of the stack that ``site`` embeds for.

        Raises:
            UserError: the site takes no prompt, or the weight is neither 0 nor 1.
        """
        stack = self.stacks.get(site.stack)
        if stack is None or stack.site.name != site.name:
            raise UserError(
                f"Site '{site.name}' takes no prompt: plug it into an embedding that token ids go into."
            )
        added = group((embeddings,), weight)
        if added is not None and added.graded:
            raise UserError(
                "A soft prompt is there for a row or it is not: its weights are 0 or 1, one for a row."
            )
        if added is not None:
            stack.tokens.add(added)

    def move(self, site: Site, keys: Source, weight: Weight, *, shift: bool) -> None:
        """Moves a stack's tokens up, for keys plugged in at one of its attention sites.

        Sites of one stack hold the same prefix as a rule: the longest of them counts.

        Args:
            site: the attention site.
            keys: ``[tokens, kv_heads, head_dim]``.
            weight: the brick's weight.
            shift: whether positions move; else the stack only takes note that keys are there.

        Raises:
            UserError: the stack takes no positions.
        """
        stack = self.stacks.get(site.stack)
        if stack is None or ("position_ids" not in stack.parameters and stack.relative is None):
            if shift:
                raise UserError(
                    f"The layers around '{site.name}' number their tokens themselves, so keys and "
                    "values cannot be put before them: choose lora or a soft prompt for this backbone."
                )
            return
        added = group((keys,), weight)
        if added is not None:
            stack.moved.setdefault(site.name, []).extend([added] if shift else [])


def _stack_module(model: nn.Module, site: Site) -> nn.Module | None:
    """The nearest module above an `embed` site that takes ids or embeddings."""
    path = site.module
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        names = inspect.signature(module.forward).parameters
        if "input_ids" in names and "inputs_embeds" in names and hasattr(module, "config"):
            return module
    return None


def _position_table(module: nn.Module, embed: nn.Module) -> nn.Embedding | None:
    """The table of learned positions, None where positions are computed."""
    most = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    for table in module.modules():
        if isinstance(table, nn.Embedding) and table is not embed and most is not None:
            if table.num_embeddings >= most:
                return table
    return None


def _make_room(cache: Any, tokens: int) -> None:
    """Makes a cache of fixed size, still empty, large enough for virtual tokens as well."""
    own = getattr(cache, "self_attention_cache", cache)
    for layer in getattr(own, "layers", ()):
        if hasattr(layer, "max_cache_len") and not layer.is_initialized and not layer.is_sliding:
            layer.max_cache_len += tokens


def _cut_encoder_states(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Forward hook of an encoder-decoder: its encoder states as long as what was given to it."""
    given = kwargs.get("input_ids")
    given = kwargs.get("attention_mask") if given is None else given
    states = None if isinstance(output, tuple) else output.get("encoder_last_hidden_state")
    if given is None or states is None or states.shape[1] <= given.shape[1]:
        return
    output.encoder_last_hidden_state = states[:, -given.shape[1] :]
    if output.get("encoder_hidden_states") is not None:
        output.encoder_hidden_states = tuple(
            h[:, -given.shape[1] :] for h in output.encoder_hidden_states
        )
