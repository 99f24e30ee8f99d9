"""The embedding port: virtual tokens in front of a stack's input (soft prompts).

A prompt lengthens the sequence, which no hook on one layer can do: the slot sits on the stack
itself (`stacks.py`). Real tokens come after the virtual ones of their own row, so rows without a
prompt equal their solo runs. Keys and values plugged into attention (`attention.py`) move positions
in the same way, without ever lying in a cache.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from cfm_train.backbone.plugs import KV, Tokens
from cfm_train.backbone.sites import Site, SiteMap
from cfm_train.backbone.stacks import Stack
from cfm_train.backbone.virtual import Source, Weight, group
from cfm_train.errors import UserError


class PromptSlot:
    """The embedding ports of a model, one for each stack.

    Args:
        model: the transformers model.
        sites: its sites; a stack is the nearest module above an `embed` site that takes embeddings.

    Attributes:
        stacks: the stacks by the prefix of their sites (``""``, ``"encoder."``, ``"decoder."``).
    """

    def __init__(self, model: nn.Module, sites: SiteMap) -> None:
        self.stacks: dict[str, Stack] = {}
        for site in sites.values():
            if site.kind != "embed" or site.stack in self.stacks:
                continue
            module = _stack_module(model, site)
            if module is not None:
                embed = model.get_submodule(site.module)
                self.stacks[site.stack] = Stack(module, embed, site, _causal(model, sites, site))
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
                f"Site '{site.name}' takes no prompt: plug it into the embedding of a stack that "
                "takes token ids."
            )
        added = group((embeddings,), weight)
        if added is not None and added.graded:
            raise UserError(
                "A soft prompt is there for a row or it is not: give it one weight for each row, 0 "
                "or 1."
            )
        if added is not None:
            stack.tokens.add(added)

    def fill(self, site: Site, plug: Tokens, weight: Weight) -> None:
        """Puts embeddings in place of placeholders among the ids of the stack of ``site``.

        Raises:
            UserError: the site takes none, or see `Placeholders.add`.
        """
        stack = self.stacks.get(site.stack)
        if stack is None or stack.site.name != site.name:
            raise UserError(
                f"Site '{site.name}' takes no embeddings in place of token ids: plug them into the "
                "embedding of a stack that takes token ids."
            )
        stack.items.add(plug, weight)

    def move(self, site: Site, plug: KV, weight: Weight) -> None:
        """Moves a stack's tokens up, for keys plugged in at one of its attention sites.

        Sites of one stack hold the same prefix as a rule: the longest of them counts.

        Args:
            site: the attention site.
            plug: the keys; without ``shift`` the stack only takes note that they are there.
            weight: the brick's weight.

        Raises:
            UserError: the stack takes no positions; or keys at shared positions and others meet
                where attention goes by distance.
        """
        stack = self.stacks.get(site.stack)
        if stack is None or not (stack.takes_positions or stack.relative is not None):
            if plug.shift:
                raise UserError(
                    f"The layers around '{site.name}' number their tokens themselves, so keys and "
                    "values cannot be put before them: choose lora or soft_prompt instead."
                )
            return
        added = group((plug.keys,), weight)
        if added is None:
            return
        moved = stack.shared if plug.shared else stack.moved
        moved.setdefault(site.name, []).extend([added] if plug.shift else [])
        if stack.relative is not None and site.name in stack.moved and site.name in stack.shared:
            raise UserError(
                f"Attention at '{site.name}' goes by how far apart tokens are, so keys at shared "
                "positions and others cannot stand there together: give all bricks the same "
                "brick.positions."
            )


def _stack_module(model: nn.Module, site: Site) -> nn.Module | None:
    """The nearest module above an `embed` site that takes ids or embeddings, and a mask."""
    path = site.module
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        taken = inspect.signature(module.forward).parameters
        if all(name in taken for name in ("input_ids", "inputs_embeds", "attention_mask")):
            return module
    return None


def _causal(model: nn.Module, sites: SiteMap, embed: Site) -> bool:
    """Whether the tokens of a stack see only what is before them."""
    return any(
        bool(getattr(model.get_submodule(site.module), "is_causal", False))
        for site in sites.values()
        if site.kind == "attention" and site.stack == embed.stack
    )


def _cut_encoder_states(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Forward hook of an encoder-decoder: encoder states only for what was given to it."""
    given = kwargs.get("input_ids")
    given = kwargs.get("attention_mask") if given is None else given
    states = None if isinstance(output, tuple) else output.get("encoder_last_hidden_state")
    if given is None or states is None or states.shape[1] <= given.shape[1]:
        return
    cut = slice(states.shape[1] - given.shape[1], None)
    output.encoder_last_hidden_state = states[:, cut]
    if output.get("encoder_hidden_states") is not None:
        output.encoder_hidden_states = tuple(h[:, cut] for h in output.encoder_hidden_states)
