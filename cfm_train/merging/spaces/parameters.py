"""The parameters themselves, tensor by tensor: bricks of any kind with equal shapes.

An update is the difference to the values with which the kind does nothing (zero; one for IA3's
factors). Low-rank factors are merged one by one, ``merge(A₁, …) · merge(B₁, …)``, which is *not*
the merge of the updates ``B A``: the products mix. It is what PEFT's ``linear`` and ``ties`` do;
the run says how far the two are apart. `merge.space=delta` merges the updates.

Where the scale ``s`` (and the weight) of an update goes is ``merge.fold``: ``sqrt`` puts its root
on both factors, as PEFT does; ``b`` puts the scale into B and the weight on both, as LoraHub does
(arXiv 2307.13269).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cfm_train.bricks.bank import bias_of, row_norms
from cfm_train.bricks.brick import Brick, parameter_name
from cfm_train.bricks.lora import LoRA
from cfm_train.errors import UserError
from cfm_train.merging.spaces.space import Entry, Options, Result, Space

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone

#: Options that do not change what a brick's parameters mean.
_FREE = ("sites", "layers", "dropout", "alpha", "rslora")


#: PEFT's tuners that change the answers when all their parameters are zero (norms' own weights,
#: scales around one, reflections): nobody says from where their updates are measured.
_NO_ORIGIN = frozenset({"boft", "frod", "hra", "ln_tuning", "psoft", "road"})


class Parameters(Space):
    """Every trained tensor of the bricks."""

    def __init__(self, bricks: Sequence[Brick], backbone: Backbone, options: Options) -> None:
        super().__init__(bricks, backbone, options)
        if options.rank is not None:
            raise UserError(
                "merge.space=parameters keeps the shapes of the bricks: leave merge.rank out"
                + (", or use merge.space=delta." if isinstance(bricks[0], LoRA) else ".")
            )
        # As they lie on disk: a P-tuning prompt without the network that it was trained through.
        self.bricks = [
            type(one).restore(one.interface(), one.body_files(), backbone)
            if one.kind == "peft"
            else one
            for one in self.bricks
        ]
        first = self.bricks[0]
        for brick in self.bricks[1:]:
            refuse_difference(first, brick)
        self.found: dict[str, Tensor] = {}

    def refuse_no_origin(self) -> None:
        """Refuses bricks whose parameters can be averaged and nothing else.

        Raises:
            UserError: with all parameters zero they are not the bare backbone.
        """
        tuner = self.bricks[0].hyper.get("tuner")
        if tuner in _NO_ORIGIN:
            raise UserError(
                f"Bricks of PEFT's {tuner} do something even when all parameters are zero, so they "
                "have no updates: use rule=linear with weights that add up to one, merge.scale=1 "
                "and sparsify=none."
            )

    def breaks(self) -> frozenset[str]:
        """Products mix with ``fold=sqrt``; a prompt of zeros is not no prompt."""
        broken = set()
        if isinstance(self.bricks[0], LoRA) and self.options.fold == "sqrt":
            broken.add("idempotent")
        if not self.bricks[0].starts_as_identity:
            broken |= {"off", "cancel"}
        return frozenset(broken)

    def entries(self) -> Iterator[Entry]:
        """The parameters in the brick's order, float64."""
        bodies = [body(brick) for brick in self.bricks]
        for name, value in bodies[0].items():
            if isinstance(value, nn.Parameter):
                load = functools.partial(self._load, name)
                part = _part(self.bricks[0], name)
                scales = self._scales(name) if part in ("A", "B") else ()
                yield Entry(name, self._site(name), load, part, scales)
            elif not all(torch.equal(other[name], value) for other in bodies):
                raise UserError(
                    f"The {self.bricks[0].kind} bricks differ in '{name}', which is no parameter "
                    "that can be merged: make them with the same options and seed."
                )

    def put(self, entry: Entry, merged: Tensor) -> None:
        """λ goes into B alone, so that it scales the update once."""
        scale = 1.0 if entry.part == "A" else self.options.scale
        base = self._base(entry.name, self.bricks[0])
        self.found[entry.name] = merged.cpu() * scale + base

    def result(self) -> Result:
        """A brick like the first one, with the merged values; cast once, here."""
        first = self.bricks[0]
        if isinstance(first, LoRA):
            return Result(self._as_lora(first), None)
        merged = type(first).restore(first.interface(), first.body_files(), self.backbone)
        with torch.no_grad():
            for name, value in body(merged).items():
                if name in self.found:
                    value.copy_(self.found[name])
        return Result(merged, None)

    def _as_lora(self, first: LoRA) -> LoRA:
        """The scale is in the factors now: alpha is each site's rank."""
        rank = max(first.lora_A[parameter_name(site)].shape[0] for site in first.site_names)
        hyper = {**first.hyper, "rank": rank, "alpha": rank, "dropout": 0.0, "rslora": False}
        merged = type(first)(**hyper)
        merged.task_type = first.task_type
        for name in first.site_names:
            key = parameter_name(name)
            A, B = self.found[f"lora_A.{key}"], self.found[f"lora_B.{key}"]
            merged.add_site(
                self.backbone.sites[name],
                A.float(),
                B.float(),
                A.shape[0],
                self.found.get(f"magnitude.{key}"),
                self.found.get(f"bias.{key}"),
            )
            merged.know(self.backbone, self.backbone.sites[name])
        return merged.to(self.backbone.device)

    def _load(self, name: str) -> Tensor:
        return torch.stack(
            [
                body(brick)[name].detach().double().cpu() * self._folded(name, brick)
                - self._base(name, brick)
                for brick in self.bricks
            ]
        )

    def _folded(self, name: str, brick: Brick) -> float:
        """The part of a low-rank update's scale that goes into this tensor."""
        part = _part(brick, name)
        if not isinstance(brick, LoRA) or not part:
            return 1.0
        scale = brick.scales[self._site(name)]
        if self.options.fold == "sqrt" and part != "bias":
            return 1.0  # it goes with the weights
        return 1.0 if part == "A" else scale

    def _scales(self, name: str) -> tuple[float, ...]:
        """What ``fold=sqrt`` multiplies the weights of a factor by."""
        if self.options.fold != "sqrt":
            return ()
        return tuple(b.scales[self._site(name)] for b in self.bricks if isinstance(b, LoRA))

    def _base(self, name: str, brick: Brick) -> Tensor | float:
        """The values with which the kind does nothing."""
        if not isinstance(brick, LoRA):
            return brick.neutral
        what = name.split(".")[0]
        if what != "magnitude" and (what != "bias" or brick.hyper["bias"] != "lora_only"):
            return 0.0
        site = self.backbone.sites[self._site(name)]
        module = self.backbone.model.get_submodule(site.module)
        if what == "magnitude":
            return row_norms(module, site).double().cpu()
        own = bias_of(module, site)
        return 0.0 if own is None else own.detach().double().cpu()

    def _site(self, name: str) -> str:
        """The site a parameter belongs to; its own name where it names none."""
        sites = [s for s in self.bricks[0].site_names if parameter_name(s) in name.split(".")]
        return sites[0] if sites else name


def body(brick: Brick) -> dict[str, Tensor]:
    """Parameters and buffers without those of the heads, not detached."""
    state = brick.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if not name.startswith("heads.")}


def _part(brick: Brick, name: str) -> str:
    """``A`` or ``B`` for low-rank factors, ``bias`` for a bias that the scale multiplies."""
    if not isinstance(brick, LoRA):
        return ""
    what = name.split(".")[0]
    if what == "bias":
        return "bias" if brick.hyper["bias"] == "lora_bias" else ""
    return {"lora_A": "A", "lora_B": "B"}.get(what, "")


def refuse_difference(one: Brick, other: Brick) -> None:
    """Refuses bricks whose parameters do not mean the same.

    Raises:
        UserError: they differ in kind, sites, shapes, or an option that decides what they compute.
    """
    if one.kind != other.kind:
        raise UserError(
            f"Bricks of the kinds {one.kind} and {other.kind} have different parameters: merge "
            "bricks of one kind, or plug both (stitch)."
        )
    free = _FREE if isinstance(one, LoRA) else ("sites", "layers", "dropout")
    free = (*free, "rank") if isinstance(one, LoRA) else free  # the shapes say it, site by site
    for key, value in one.hyper.items():
        if key not in free and other.hyper.get(key) != value:
            raise UserError(
                f"The {one.kind} bricks differ in brick.{key} ({value} and "
                f"{other.hyper.get(key)}): their parameters cannot be merged one by one."
                + (" Use merge.space=delta." if isinstance(one, LoRA) else "")
            )
    a, b = body(one), body(other)
    different = sorted(n for n in a.keys() | b.keys() if n not in a or n not in b)
    different += [n for n in a if n in b and a[n].shape != b[n].shape]
    if different or one.site_names != other.site_names:
        where = f" (first at '{different[0]}')" if different else ""
        raise UserError(
            f"The {one.kind} bricks differ in their sites or shapes{where}: their parameters "
            "cannot be merged one by one."
            + (" Use merge.space=delta, which takes any ranks." if isinstance(one, LoRA) else "")
        )
