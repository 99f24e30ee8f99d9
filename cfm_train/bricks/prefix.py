"""Prefixes: learned keys and values that every attention layer sees first.

    attention(q, [K_p; K], [V_p; V])      K_p, V_p learned, everything else frozen

Li and Liang 2021, "Prefix-Tuning", arXiv 2101.00190. A prefix starts as the keys and values that
real tokens leave behind, as if they had been read before the input (the paper's choice for few
data), or as noise. With ``projection`` it is that start plus a small network's output, which the
paper found steadier to train:

    [K_p; V_p] = start + W_2 tanh(W_1 e + b_1) + b_2       W_2 = 0 at first

On disk a prefix is what it comes to: PEFT's format where PEFT can say it (all self-attention layers
of the only stack, or of the decoder), else ``brick.safetensors``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from safetensors.torch import load
from torch import Tensor, nn

from cfm_train.backbone.plugs import KV
from cfm_train.backbone.sites import AttentionSite
from cfm_train.bricks import prefix_files
from cfm_train.bricks.brick import NATIVE_FILE, Brick, parameter_name
from cfm_train.bricks.prompt_files import start_ids
from cfm_train.config.types import Positive, Text
from cfm_train.errors import UserError
from cfm_train.library.peft_format import CONFIG_FILE

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone

#: Keys and values of one site, ``[tokens, kv_heads, head_dim]`` each.
States = tuple[Tensor, Tensor]


class Prefix(Brick):
    """Keys and values before those of attention layers.

    Args:
        tokens: how many virtual tokens.
        init: ``vocabulary`` starts from what random tokens leave behind, ``text`` from ``text``,
            ``random`` from noise of the same spread.
        text: what is read at first, cut or repeated to the length; None without ``init=text``.
        sites: patterns of attention sites: ``attn`` for self-attention, ``cross`` for that of a
            decoder to its encoder.
        layers: numbers of the layers to use, negative ones from the top; None for all.
        projection: width of the network that computes the prefix while it trains; None for none.
        positions: ``behind`` lies behind what other bricks put before an input, as in PEFT;
            ``shared`` at the same positions, see `plugs.KV`. Alone both are the same.
    """

    starts_as_identity: ClassVar[bool] = False

    def __init__(
        self,
        tokens: Positive,
        init: Literal["vocabulary", "text", "random"],
        text: Text | None,
        sites: list[str],
        layers: list[int] | None,
        projection: Positive | None,
        positions: Literal["behind", "shared"],
    ) -> None:
        super().__init__(
            tokens=tokens,
            init=init,
            text=text,
            sites=sites,
            layers=layers,
            projection=projection,
            positions=positions,
        )
        self.keys = nn.ParameterDict()
        self.values = nn.ParameterDict()
        self.projected: Projection | None = None
        self.layout: prefix_files.Layout | None = None

    def build(self, backbone: Backbone) -> Self:
        """Makes keys and values for every chosen site, and the network where there is one."""
        hyper = self.hyper
        sites = attention_sites(backbone, hyper["sites"], hyper["layers"])
        ids = start_ids(backbone, hyper["tokens"], hyper["init"], hyper["text"])
        states = token_states(backbone, ids, [site.name for site in sites])
        if hyper["init"] == "random":
            states = {
                name: (torch.randn_like(k) * k.std(), torch.randn_like(v) * v.std())
                for name, (k, v) in states.items()
            }
        if hyper["projection"] is not None:
            self.projected = Projection(states, backbone.hidden_size, hyper["projection"])
        return self.hold(states, backbone)

    def hold(self, states: Mapping[str, States], backbone: Backbone) -> Self:
        """Takes the sites of ``states``, and their keys and values if no network computes them."""
        self.site_names = tuple(name for name in backbone.sites if name in states)
        self.layout = prefix_files.layout_of(self.site_names, backbone)
        if self.projected is None:
            for name, (keys, values) in states.items():
                self.keep(name, keys.float(), values.float())
        return self.to(backbone.device)

    def keep(self, site: str, keys: Tensor, values: Tensor) -> None:
        """Makes a site's keys and values ``[tokens, kv_heads, head_dim]`` the brick's own."""
        self.keys[parameter_name(site)] = nn.Parameter(keys)
        self.values[parameter_name(site)] = nn.Parameter(values)

    @property
    def computed(self) -> bool:
        """Whether keys and values are computed anew in each pass, so that gradients find parts."""
        return self.projected is not None

    @property
    def length(self) -> int:
        """How many virtual tokens stand before an input."""
        return len(self.states(self.site_names[0])[0])

    def states(self, site: str) -> States:
        """What the prefix holds for a site, computed where a network does it."""
        if self.projected is not None:
            return self.projected(site)
        key = parameter_name(site)
        return self.keys[key], self.values[key]

    def plugs(self) -> Iterable[KV]:
        """Keys and values for each site."""
        for site in self.site_names:
            # An encoder's states have no positions that a decoder's could share.
            shared = self.hyper["positions"] == "shared" and not site.endswith(".cross")
            if not self.computed:
                yield KV(site, *self.states(site), shared=shared)
            else:
                part = functools.partial(self._state, site)
                both = functools.partial(part, 0), functools.partial(part, 1)
                yield KV(site, *both, shared=shared)

    def _state(self, site: str, which: int) -> Tensor:
        return self.states(site)[which]

    def tensors(self) -> dict[str, Tensor]:
        """Keys and values of every site, also where a network computes them."""
        found = {}
        for site in self.site_names:
            keys, values = self.states(site)
            found[f"keys.{parameter_name(site)}"] = keys.detach()
            found[f"values.{parameter_name(site)}"] = values.detach()
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets keys and values; a network that computed them is dropped."""
        own = self.tensors()
        wrong = [n for n in own if n not in tensors or tensors[n].shape != own[n].shape]
        wrong += sorted(tensors.keys() - own.keys())
        if wrong:
            raise UserError(
                f"Tensor '{wrong[0]}' of the prefix is missing, unknown or of another shape than "
                "the backbone needs: it was made for other sites or another model."
            )
        self.projected = None
        for site in self.site_names:
            pair = (f"{what}.{parameter_name(site)}" for what in ("keys", "values"))
            self.keep(site, *(tensors[name].float().to(own[name].device) for name in pair))

    def body_files(self) -> dict[str, bytes]:
        """PEFT's two files where PEFT can say what the prefix is, else ``brick.safetensors``."""
        states = {site: self.states(site) for site in self.site_names}
        flat = None if self.layout is None else self.layout.flatten(states)
        if self.layout is None or flat is None:
            return super().body_files()
        return self.layout.write(flat, **self.format())

    def format(self) -> dict[str, Any]:
        """PEFT's name for what this is, and what its config says beyond the shape."""
        return {"peft_type": "PREFIX_TUNING"}

    @classmethod
    def restore(
        cls, interface: Mapping[str, Any], files: Mapping[str, bytes], backbone: Backbone
    ) -> Self:
        """A brick from PEFT's two files, trained here or anywhere else, or from our own.

        Raises:
            UserError: another kind of adapter, or one for a model of another shape.
        """
        states, config = read_states(interface, files, backbone)
        hyper = interface.get("hyper") or cls.found(states, config)
        # Bricks of before there was a choice lie behind each other.
        return cls(**{"positions": "behind"} | hyper).hold(states, backbone)

    @classmethod
    def found(cls, states: Mapping[str, States], config: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a brick that was not made here.

        Args:
            states: its keys and values by site.
            config: PEFT's config of it.
        """
        plain = {"tokens": length(states), "init": "vocabulary", "text": None, "layers": None}
        return {**plain, "sites": list(states), "projection": None}


class Projection(nn.Module):
    """A prefix as its start plus the output of a small network, one pair of tensors for each site.

    Args:
        states: what the prefix starts as, by site.
        width: width of each token's own embedding.
        inner: width of the network's inside.
    """

    def __init__(self, states: Mapping[str, States], width: int, inner: int) -> None:
        super().__init__()
        first = next(iter(states.values()))[0]
        self.shapes = {name: (k.shape[1:], v.shape[1:]) for name, (k, v) in states.items()}
        start = torch.cat([part.flatten(1) for pair in states.values() for part in pair], dim=1)
        self.register_buffer("start", start.float())  # [tokens, all features]
        self.embedding = nn.Parameter(torch.randn(len(first), width))
        self.inner = nn.Linear(width, inner)
        self.outer = nn.Linear(inner, start.shape[1])
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, site: str) -> States:
        """Keys and values of a site, ``[tokens, kv_heads, head_dim]`` each."""
        start: Tensor = self.start  # type: ignore[assignment]
        hidden = torch.tanh(self.inner(self.embedding))
        at = 0
        for name, (key, value) in self.shapes.items():
            end = at + key.numel() + value.numel()
            if name == site:
                rows = slice(at, end)
                part = nn.functional.linear(hidden, self.outer.weight[rows], self.outer.bias[rows])
                keys, values = (start[:, rows] + part).split([key.numel(), value.numel()], dim=1)
                return keys.unflatten(1, key), values.unflatten(1, value)
            at = end
        raise KeyError(site)


def attention_sites(
    backbone: Backbone, patterns: list[str], layers: list[int] | None
) -> list[AttentionSite]:
    """The attention sites that patterns choose.

    Raises:
        UserError: a pattern matches nothing, or a site that is no attention.
    """
    chosen = []
    for site in backbone.sites.select(patterns, layers):
        if not isinstance(site, AttentionSite):
            raise UserError(
                f"Site '{site.name}' is a {site.kind}, not attention: choose attn, or cross for "
                "that of a decoder to its encoder."
            )
        chosen.append(site)
    return chosen


def token_states(backbone: Backbone, ids: Tensor, sites: list[str]) -> dict[str, States]:
    """The keys and values that tokens leave behind in the bare backbone, as attention sees them.

    Args:
        backbone: the backbone; what is plugged in is put aside for the pass.
        ids: token ids ``[tokens]``; a decoder behind an encoder reads them too.
        sites: names of attention sites.

    Returns:
        For each site keys and values ``[tokens, kv_heads, head_dim]`` float32.
    """
    inputs = {"input_ids": ids[None]}
    if backbone.family == "encoder-decoder":
        start = backbone.model.config.decoder_start_token_id or 0
        inputs["decoder_input_ids"] = torch.cat([ids.new_tensor([start]), ids[:-1]])[None]
    if backbone.family == "decoder":
        inputs["use_cache"] = False  # type: ignore[assignment]
    slots = backbone.slots
    with slots.plugged([]), slots.recording(sites) as noted, torch.no_grad():
        backbone.model(**inputs)
    return {
        name: (keys[0].transpose(0, 1).float(), values[0].transpose(0, 1).float())
        for name, (keys, values) in noted.items()
    }


def read_states(
    interface: Mapping[str, Any], files: Mapping[str, bytes], backbone: Backbone
) -> tuple[dict[str, States], dict[str, Any]]:
    """Keys and values by site from PEFT's two files or from our own, and PEFT's config.

    Raises:
        UserError: another kind of adapter, or one for a model of another shape.
    """
    if CONFIG_FILE in files:
        return prefix_files.read_states(files, backbone)
    return _native(load(files[NATIVE_FILE]), interface["sites"], backbone), {}


def length(states: Mapping[str, States]) -> int:
    """How many virtual tokens keys and values are of."""
    return len(next(iter(states.values()))[0])


def room(bricks: Iterable[Brick]) -> int:
    """How many positions before an input several bricks take: those that share some, the most."""
    behind, shared = 0, 0
    for one in bricks:
        if isinstance(one, Prefix) and one.hyper["positions"] == "shared":
            shared = max(shared, one.length)
        elif isinstance(one, Prefix):
            behind += one.length
    return behind + shared


def _native(
    tensors: Mapping[str, Tensor], sites: Iterable[str], backbone: Backbone
) -> dict[str, States]:
    """Keys and values by site from our own file."""
    states = {}
    for site in sites:
        pair = [tensors.get(f"{what}.{parameter_name(site)}") for what in ("keys", "values")]
        found = backbone.sites[site]
        heads = found.kv_heads if isinstance(found, AttentionSite) else None
        if any(part is None or part.ndim != 3 or part.shape[1] != heads for part in pair):
            raise UserError(
                f"The prefix has no fitting keys and values for '{site}': it was made for another "
                "model, or its file is incomplete."
            )
        states[site] = (pair[0], pair[1])
    return states  # type: ignore[return-value]
