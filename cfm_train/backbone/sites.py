"""Sites: named places in a backbone, with the same names on every architecture.

    [encoder.|decoder.]layer.i.{attn,cross,ffn}.{q,k,v,o,gate,up,down}     linear maps
    layer.i.attn.{qkv,qk,kv}, layer.i.ffn.gate_up                         whole fused modules
    layer.i.ffn.experts, layer.i.ffn.shared.{gate,up,down}                mixtures of experts
    layer.i, layer.i.attn, layer.i.cross, layer.i.norm.j                  layers, attention, norms
    embed, norm, head                                                     around the layers

A site is a module or some of its output features: a fused projection has one site for each part.
A layer whose weights run several times (ALBERT) is one layer. `find_sites` follows the data flow of
the model instead of reading names (`trace.py`, `roles.py`), and refuses what it cannot tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from cfm_train.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Names of whole fused modules: the parts have sites too, so wildcards leave the wholes out.
WHOLES = frozenset({"qkv", "qk", "kv", "qv", "gate_up"})


@dataclass(frozen=True)
class Site:
    """One place in a backbone.

    Attributes:
        name: the site's name, the same on every architecture.
        module: dotted path inside the transformers model.
        kind: ``linear``, ``conv1d``, ``embed``, ``head``, ``layer``, ``attention``, ``norm`` or
            ``experts``.
        in_features: width of what goes in (for ``embed`` the number of tokens).
        out_features: width of what comes out; of the site's own part for a fused module.
        rows: the output features of the module that are this site, as (start, stop) ranges in
            ascending order; None for all of them.
        transposed: whether the weight is stored ``[in, out]`` (GPT-2's Conv1D).
        bias: whether the module adds a bias.
    """

    name: str
    module: str
    kind: str
    in_features: int
    out_features: int
    rows: tuple[tuple[int, int], ...] | None = None
    transposed: bool = False
    bias: bool = False

    @property
    def stack(self) -> str:
        """``"encoder."`` or ``"decoder."`` in an encoder-decoder, else ``""``."""
        return _place(self.name)[0]

    @property
    def layer(self) -> int | None:
        """The number of the layer that the site lies in; None for ``embed``, ``norm``, ``head``."""
        return _place(self.name)[1]


@dataclass(frozen=True)
class AttentionSite(Site):
    """The module that calls the attention function: the port ``kv``.

    Attributes:
        heads: number of query heads.
        kv_heads: number of key and value heads.
        head_dim: width of one query or key head.
        value_dim: width of one value head; differs from ``head_dim`` in latent attention only.
        kv: whether the port is open: some architectures compute attention in a way of their own.
    """

    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0
    kv: bool = False


class SiteMap(Mapping[str, Site]):
    """All sites of a backbone, by name, in the order in which they run.

    Args:
        sites: the sites; names are unique.
        hidden_size: width of the residual stream.
        layers: number of layers of each stack, by prefix: ``{"": 6}``, or
            ``{"encoder.": 6, "decoder.": 6}``.
        absent: names that a person may expect, each with the sentence why it is refused.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        hidden_size: int,
        layers: Mapping[str, int],
        absent: Mapping[str, str] | None = None,
    ) -> None:
        self._sites = {site.name: site for site in sites}
        self.hidden_size = hidden_size
        self.layers = dict(layers)
        self.absent = dict(absent or {})

    def __getitem__(self, name: str) -> Site:
        try:
            return self._sites[name]
        except KeyError:
            if name in self.absent:
                raise UserError(self.absent[name]) from None
            hint = nearest(name, self._sites)
            raise UserError(f"The backbone has no site '{name}'.{hint}") from None

    def get(self, name: str, default: Any = None) -> Any:
        """The site of that name, or ``default``."""
        return self._sites.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._sites

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def select(self, patterns: Sequence[str], layers: Sequence[int] | None = None) -> list[Site]:
        """The sites that a brick names.

        A pattern fits a name at its end, whole words at a time, and may leave layer numbers out:
        ``attn.q`` fits ``layer.3.attn.q``; ``layer`` every layer; ``decoder.layer.*.ffn.*`` what it
        says. A wildcard takes the parts of a fused module, never the whole beside them.

        Args:
            patterns: names or patterns with ``*``, ``?`` and ``[…]``.
            layers: numbers of the layers to keep; negative ones count from the top of each stack.
                Sites outside of the layers (``embed``, ``head``) are kept. None keeps all.

        Returns:
            Sites in the order in which they run, each once.

        Raises:
            UserError: a pattern fits nothing, or a layer does not exist.
        """
        wanted: set[str] = set()
        for pattern in patterns:
            for name, reason in self.absent.items():
                if fits(pattern, name) and self._inside(name, layers):
                    raise UserError(reason)
            found = [name for name in self._sites if fits(pattern, name)]
            if not found:
                hint = nearest(pattern, _tails(self._sites))
                raise UserError(f"The backbone has no site '{pattern}'.{hint}")
            wanted.update(found)
        for number in layers or []:
            if not any(-count <= number < count for count in self.layers.values()):
                raise UserError(
                    f"The backbone has no layer {number}: it has {max(self.layers.values())} "
                    "layers, counted from 0, or from -1 at the top."
                )
        wanted = {name for name in wanted if self._inside(name, layers)}
        return [site for name, site in self._sites.items() if name in wanted]

    def _inside(self, name: str, layers: Sequence[int] | None) -> bool:
        stack, layer = _place(name)
        if layers is None or layer is None:
            return True
        return layer in layers or layer - self.layers[stack] in layers


def find_sites(model: PreTrainedModel) -> SiteMap:
    """Finds the sites of a transformers model by following its data flow on the meta device.

    Args:
        model: a transformers model; it is not run, only its class and config are used.

    Returns:
        All sites.

    Raises:
        UserError: the model cannot be traced, or the role of a module is ambiguous.
    """
    from cfm_train.backbone.roles import assign
    from cfm_train.backbone.trace import trace

    return assign(trace(model))


def _place(name: str) -> tuple[str, int | None]:
    """The stack and the layer number in a site's name."""
    head = name.split(".", 1)[0]
    stack = f"{head}." if head in ("encoder", "decoder") else ""
    parts = name.removeprefix(stack).split(".")
    return stack, int(parts[1]) if parts[0] == "layer" else None


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern fits the end of a name, with or without the name's layer numbers."""
    parts = pattern.split(".")
    if name.rsplit(".", 1)[-1] in WHOLES and any(c in parts[-1] for c in "*?["):
        return False
    for words in (name.split("."), _without_numbers(name).split(".")):
        tail = words[-len(parts) :]
        if len(tail) == len(parts) and all(map(fnmatchcase, tail, parts)):
            return True
    return False


def _without_numbers(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


def _tails(names: Iterable[str]) -> set[str]:
    """What people usually write: names without numbers, and their last two words (``attn.q``)."""
    plain = {_without_numbers(name) for name in names}
    return plain | {".".join(name.split(".")[-2:]) for name in plain}
