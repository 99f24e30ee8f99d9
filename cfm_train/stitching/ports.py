"""Where bricks act, as far as stitching must know it, and which of them may meet at a site.

A brick's contribution b is a function of something, h, and what h is decides with whom it can be
stitched:

    linear    b(x) = s B A x (+ s c)            h is a linear site's input      LoRA, rsLoRA
    fixed     its own answer minus the backbone's: a function of that input that cannot be fed with
              another                           DoRA, bias=lora_only
    added     a function of the module's input (or of nothing) added to its output
                                                parallel adapters, bias and norm deltas
    output    b(h) = fn(h) - h                  h is a site's output    adapters, IA3 on k and v
    input     b(h) = fn(h) - h                  h is a site's input     IA3 on the feed-forward
    tokens    virtual tokens before the input   nothing is added up     soft prompts
    keys      keys and values before a layer's own, the same            prefixes
    alone     a site's whole output anew        PEFT's other tuners, task vectors

A kind that is not named here is ``alone``: it is stitched where it has its sites to itself. No
torch, so that cards alone are enough to refuse what cannot be stitched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cfm_train.backbone.sites import WHOLES
from cfm_train.errors import UserError
from cfm_train.stitching.mode import Mode


class Port(StrEnum):
    """What a brick's contribution is a function of, see above."""

    LINEAR = "linear"
    FIXED = "fixed"
    ADDED = "added"
    OUTPUT = "output"
    INPUT = "input"
    TOKENS = "tokens"
    KEYS = "keys"
    ALONE = "alone"


#: Ports at which bricks put something before the text.
VIRTUAL = (Port.TOKENS, Port.KEYS)


@dataclass(frozen=True)
class Place:
    """One site of a brick and how it acts there.

    Attributes:
        site: the site's name.
        port: how it acts.
        what: what a person calls the brick there, such as ``DoRA``.
    """

    site: str
    port: Port
    what: str


@dataclass(frozen=True)
class Part:
    """What stitching must know of one of the bricks.

    Attributes:
        label: what a person calls it.
        places: where it acts; several at one site where it is itself a combination.
    """

    label: str
    places: tuple[Place, ...]

    @property
    def sites(self) -> frozenset[str]:
        """The sites where it acts."""
        return frozenset(place.site for place in self.places)

    def at(self, port: Port) -> Part:
        """What it does at one port."""
        return Part(self.label, tuple(place for place in self.places if place.port == port))


def places_of(
    kind: str, hyper: Mapping[str, Any] | None, sites: Sequence[str]
) -> tuple[Place, ...] | None:
    """Where a brick acts, from what its card says.

    Args:
        kind: its kind.
        hyper: its hyper-parameters; None where the card has none (an adapter from elsewhere).
        sites: the names of its sites.

    Returns:
        The places; None where only the brick itself can tell.
    """
    if kind == "head":
        return ()
    if not sites or (hyper is None and kind in ("lora", "bottleneck", "ia3", "peft")):
        return None
    hyper = hyper or {}
    if kind == "ia3" and any(set("*?[") & set(pattern) for pattern in hyper["inputs"]):
        return None
    return tuple(Place(site, *_port(kind, hyper, site)) for site in sites)


def _port(kind: str, hyper: Mapping[str, Any], site: str) -> tuple[Port, str]:
    if kind == "lora":
        if hyper["dora"]:
            return Port.FIXED, "DoRA"
        if hyper["bias"] == "lora_only":
            return Port.FIXED, "LoRA with bias=lora_only"
        return Port.LINEAR, "LoRA"
    if kind == "bottleneck":
        parallel = hyper["placement"] == "parallel"
        return (Port.ADDED if parallel else Port.OUTPUT), f"{hyper['placement']} adapter"
    if kind == "ia3":
        scales_input = any(site == p or site.endswith(f".{p}") for p in hyper["inputs"])
        return (Port.INPUT if scales_input else Port.OUTPUT), "IA3"
    if kind == "peft":
        return (Port.TOKENS if hyper["tuner"] == "p_tuning" else Port.ALONE), hyper["tuner"]
    if kind in ("soft_prompt", "prefix", "cartridge", "document"):
        return (Port.TOKENS if kind == "soft_prompt" else Port.KEYS), kind
    return (Port.ADDED if kind == "delta" else Port.ALONE), kind


def named_overlap(one: str, other: str) -> bool:
    """Whether two sites are a fused module and a part of it, as far as their names tell."""
    (place, _, last), (other_place, _, other_last) = one.rpartition("."), other.rpartition(".")
    if place != other_place or last == other_last:
        return False
    for whole, part in ((last, other_last), (other_last, last)):
        if whole in WHOLES:
            members = whole.split("_") if "_" in whole else list(whole)
            inner = part.split("_") if "_" in part else list(part)
            return bool(set(members) & set(inner))
    return False


def named_group(site: str) -> str:
    """The part of a backbone inside which sites can be parts of one module, by its name."""
    return site.rpartition(".")[0]


def check_parts(
    mode: Mode,
    parts: Sequence[Part],
    overlap: Callable[[str, str], bool] = named_overlap,
    group: Callable[[str], str] = named_group,
) -> None:
    """Refuses bricks that a mode cannot stitch; looks at names and ports alone.

    Args:
        mode: the mode.
        parts: the bricks in order.
        overlap: whether two sites of different names share a module's output.
        group: what two sites must have in common to meet at all.

    Raises:
        UserError: naming the bricks, the site and a way out.
    """
    if len(parts) < 2:
        return  # one brick alone is that brick, whatever it is
    _check_tokens(mode, parts)
    if mode.everywhere:
        _check_same_sites(mode, parts)
    if mode.tokens:  # a soft prompt and a prefix act on different sites, two prefixes must not
        for port in VIRTUAL:
            _check_same_sites(mode, [there for part in parts if (there := part.at(port)).places])
    by_module: dict[str, list[tuple[int, Place]]] = {}
    for number, part in enumerate(parts):
        for place in part.places:
            by_module.setdefault(group(place.site), []).append((number, place))
    for found in by_module.values():
        for at, (number, place) in enumerate(found):
            for other_number, other in found[:at]:
                if number != other_number:
                    _check_meeting(
                        mode,
                        (parts[other_number].label, other),
                        (parts[number].label, place),
                        overlap,
                    )


def _check_tokens(mode: Mode, parts: Sequence[Part]) -> None:
    """Virtual tokens are joined by ``prompt`` alone, and nothing else is."""
    with_tokens = [p for p in parts if any(x.port in VIRTUAL for x in p.places)]
    if mode.tokens:
        for part in parts:
            others = [place for place in part.places if place.port not in VIRTUAL]
            if others or not part.places:
                does = f"acts on '{others[0].site}' ({others[0].what})" if others else "has none"
                raise UserError(
                    f"mode={mode.name} puts virtual tokens one after the other, and '{part.label}' "
                    f"{does}: use mode=sum, which takes one brick of virtual tokens with others."
                )
    elif len(with_tokens) > 1:
        one, other = with_tokens[:2]
        raise UserError(
            f"'{one.label}' and '{other.label}' both put virtual tokens before the input, which "
            f"mode={mode.name} cannot join: use mode=prompt."
        )
    elif with_tokens and mode.everywhere:
        raise UserError(
            f"'{with_tokens[0].label}' puts virtual tokens before the input, which cannot be fed "
            f"through a {mode.name}: use mode=sum."
        )


def _check_same_sites(mode: Mode, parts: Sequence[Part]) -> None:
    for one, other in ((parts[0], part) for part in parts[1:]):
        for has, lacks in ((one, other), (other, one)):
            if missing := sorted(has.sites - lacks.sites):
                raise UserError(
                    f"mode={mode.name} needs every brick at every site, and '{lacks.label}' does "
                    f"not act on '{missing[0]}', where '{has.label}' does ({len(missing)} such "
                    "sites): "
                    + (
                        "use bricks on the same sites."
                        if mode.tokens
                        else "use mode=chain or mode=sum, where a brick that is absent changes "
                        "nothing."
                    )
                )


def _check_meeting(
    mode: Mode,
    first: tuple[str, Place],
    second: tuple[str, Place],
    overlap: Callable[[str, str], bool],
) -> None:
    (one, place), (two, other) = first, second
    together = {str(place.port), str(other.port)}
    fits = any(together <= group for group in mode.meets)
    if place.site != other.site:
        if overlap(place.site, other.site) and not together <= mode.side_by_side:
            raise UserError(
                f"'{one}' acts on '{place.site}' and '{two}' on '{other.site}', which share "
                f"features of one module: mode={mode.name} needs bricks on the same sites."
            )
        return
    if fits:
        return
    if Port.ALONE in (place.port, other.port):
        label, what = (one, place.what) if place.port == Port.ALONE else (two, other.what)
        raise UserError(
            f"'{label}' ({what}) computes the output of '{place.site}' anew, so no other brick can "
            f"be stitched to it there: use bricks on other sites than "
            f"'{two if label == one else one}'."
        )
    if place.port == other.port or together <= {"linear", "fixed", "added"}:
        label, what = (one, place.what) if place.port != Port.LINEAR else (two, other.what)
        raise UserError(
            f"'{label}' ({what}) adds something to '{place.site}' that cannot be fed with what "
            f"another brick adds, so mode={mode.name} cannot stitch it there: use mode=sum."
        )
    raise UserError(
        f"'{one}' ({place.what}) and '{two}' ({other.what}) meet at '{place.site}', one at its "
        f"{_side(place.port)} and one at its {_side(other.port)}, so there is no common value to "
        "stitch: use bricks of one kind there, or on other sites."
    )


def _side(port: Port) -> str:
    return "output" if port == Port.OUTPUT else "input"


def too_wide(mode: Mode, one: str, two: str, where: str, inner: int, outer: int) -> str:
    """Why bricks cannot be chained or piped at a linear site that is not square."""
    return (
        f"'{one}' and '{two}' meet at '{where}', which maps {inner} to {outer} features: "
        f"mode={mode.name} feeds one brick with what another adds and needs as many; use mode=sum, "
        "or bricks on sites such as attn.q and attn.o."
    )
