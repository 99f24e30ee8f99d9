"""Slots: the places in a frozen backbone where bricks plug in.

Every site has one slot, put there once when the backbone is loaded. A slot is a pair of hooks on
the site's module that read a shared *plan*. An empty slot returns nothing, so the module's own
result goes on untouched: unplugging is exact because nothing was ever added to a weight.

What a brick puts into a slot is a plug (`plugs.py`). Each brick of a plan carries a weight:
``None`` for every row, a number, or a tensor ``[batch]`` or ``[batch, seq]``; with it one batch may
hold another brick for every row. The plan stays in place until it is replaced, so that a recomputed
checkpoint sees the same plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from cfm_train.backbone.attention import KVSlot, Recorded
from cfm_train.backbone.company import refuse_company
from cfm_train.backbone.plugs import KV, Call, In, Out, Plug, Pluggable, Prompt, Together, Tokens
from cfm_train.backbone.prompts import PromptSlot
from cfm_train.backbone.rows import blend, put_rows, rows_of
from cfm_train.backbone.sites import AttentionSite, Site, SiteMap
from cfm_train.backbone.virtual import Weight
from cfm_train.errors import UserError, nearest


@dataclass(slots=True)
class _ModuleSlot:
    """The slot of one backbone module; several sites may be slices of that module."""

    module: nn.Module
    slots: Slots
    together: list[tuple[Together, Weight]] = field(default_factory=list)
    outs: list[tuple[Out, Weight]] = field(default_factory=list)
    ins: list[tuple[In, Weight]] = field(default_factory=list)
    capture: list[str] = field(default_factory=list)

    def clear(self) -> None:
        self.together, self.outs, self.ins, self.capture = [], [], [], []

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook: the port ``in``."""
        if not self.ins and not self.capture:
            return None
        x = args[0]
        for name in self.capture:
            self.slots.captured[name] = x
        for plug, weight in self.ins:
            site = self.slots.sites[plug.site]
            call = Call(site, module, x, None, None, self.slots.captured)
            x = blend(x, plug.fn(call), weight)
        return (x, *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: the port ``out``; the bank first, then the other plugs in plan order."""
        if not self.together and not self.outs:
            return None
        # A layer returns a tuple on some architectures: the hidden states come first.
        rest = output[1:] if isinstance(output, tuple) else None
        base = output[0] if isinstance(output, tuple) else output
        x, y = args[0] if args else base, base
        if self.together:
            y = self.together[0][0].run(self.slots.sites, module, x, base, self.together)
        for plug, weight in self.outs:
            site = self.slots.sites[plug.site]
            old = rows_of(y, site)
            call = Call(site, module, x, rows_of(base, site), old, self.slots.captured)
            y = put_rows(y, blend(old, plug.fn(call), weight), site)
        return y if rest is None else (y, *rest)


class Slots:
    """All slots of one backbone and the plan that is plugged into them.

    Args:
        model: the transformers model, frozen.
        sites: its sites.
    """

    def __init__(self, model: nn.Module, sites: SiteMap) -> None:
        self.sites = sites
        self.captured: dict[str, Tensor] = {}
        self.plan: list[tuple[Pluggable, Weight]] = []
        self._modules: dict[str, _ModuleSlot] = {}
        self._kv: dict[str, KVSlot] = {}
        self._prompt = PromptSlot(model, sites)
        for site in sites.values():
            module = model.get_submodule(site.module)
            if isinstance(site, AttentionSite):
                stack = self._prompt.stacks.get(site.stack)
                self._kv[site.name] = KVSlot.install(module, site, stack)
            elif site.module not in self._modules:
                slot = self._modules[site.module] = _ModuleSlot(module, self)
                module.register_forward_pre_hook(slot.before)
                module.register_forward_hook(slot.after)

    def plug(self, bricks: Sequence[Pluggable], weights: Sequence[Weight] | None = None) -> None:
        """Replaces the plan. Bricks act in the order given; those that run together come first.

        Args:
            bricks: the bricks; none empties every slot.
            weights: one weight for each brick, see the module's docstring.

        Raises:
            UserError: a site does not exist, a plug does not fit its site, or one that needs the
                site alone has company.
        """
        plan = list(zip(bricks, weights or [None] * len(bricks), strict=True))
        wanted = [(plug, weight) for brick, weight in plan for plug in brick.plugs()]
        self.unplug()
        try:
            for plug, weight in wanted:
                self._place(plug, weight)
            for path, slot in self._modules.items():
                refuse_company(path, [*slot.together, *slot.outs, *slot.ins])
        except UserError:
            self.unplug()
            raise
        self.plan = plan

    def unplug(self) -> None:
        """Empties every slot: the backbone answers as if nothing had ever been plugged."""
        self.plan = []
        self.captured.clear()
        for slot in self._modules.values():
            slot.clear()
        for kv in self._kv.values():
            kv.clear()
        self._prompt.clear()

    def take(self, batch: Mapping[str, Any]) -> None:
        """Hands a batch to the plugged bricks that read more of it than its token ids.

        Called before each pass whose ids may hold placeholders; what was taken stays until then,
        so that a recomputed checkpoint sees the same.
        """
        for brick, _ in self.plan:
            take = getattr(brick, "take", None)
            if take is not None:
                take(batch)

    @contextmanager
    def plugged(
        self, bricks: Sequence[Pluggable], weights: Sequence[Weight] | None = None
    ) -> Iterator[None]:
        """Plugs bricks for the length of a ``with`` block, then restores the plan before it."""
        before = self.plan
        self.plug(bricks, weights)
        try:
            yield
        finally:
            self.plug([b for b, _ in before], [w for _, w in before])

    @contextmanager
    def recording(self, sites: Iterable[str]) -> Iterator[Recorded]:
        """Notes the keys and values that attention sites compute themselves.

        Yields:
            site name -> keys and values ``[batch, kv_heads, tokens, head_dim]`` of the last pass,
            in the backbone's dtype and as attention sees them (rotated); filled inside the block.
        """
        noted: Recorded = {}
        slots = [self._kv_slot(self.sites[name]) for name in sites]
        for slot in slots:
            slot.record = noted
        try:
            yield noted
        finally:
            for slot in slots:
                slot.record = None

    def _kv_slot(self, site: Site) -> KVSlot:
        if site.name not in self._kv:
            raise UserError(
                f"Site '{site.name}' is no attention, so it takes no keys and values."
                f"{nearest(site.name, self._kv)}"
            )
        if not self._kv[site.name].site.kv:
            raise UserError(
                f"The backbone computes attention at '{site.name}' in its own way, which takes "
                "no keys and values from outside: choose lora or soft_prompt for it."
            )
        return self._kv[site.name]

    def _place(self, plug: Plug, weight: Weight) -> None:
        site = self.sites[plug.site]
        if isinstance(plug, KV):
            kv = self._kv_slot(site)
            kv.add(plug.keys, plug.values, weight, plug.members)
            if not kv.cross:
                self._prompt.move(site, plug, weight)
        elif isinstance(plug, Prompt):
            self._prompt.add(site, plug.embeddings, weight)
        elif isinstance(plug, Tokens):
            self._prompt.fill(site, plug, weight)
        else:
            slot = self._modules[site.module]
            if isinstance(plug, Together):
                slot.together.append((plug, weight))
            elif isinstance(plug, In):
                if site.rows is not None:
                    raise UserError(
                        f"Site '{site.name}' shares its input with other sites of the fused module "
                        f"'{site.module}': plug into its output, or into the whole module."
                    )
                slot.ins.append((plug, weight))
            else:
                slot.outs.append((plug, weight))
                if plug.reads is not None:
                    self._modules[self.sites[plug.reads].module].capture.append(plug.reads)
