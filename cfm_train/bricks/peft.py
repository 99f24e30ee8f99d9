"""Bricks that run through PEFT itself: AdaLoRA, VeRA, LoHa, LoKr, OFT, BOFT, P-tuning and others.

The kind is named as the library names it, ``peft``; which of PEFT's tuners it is stands in
``tuner``. The layers are PEFT's own, built beside the backbone and called by its slots
(`peft_layers.py`), so a brick plugs and unplugs exactly and its parameters are never part of the
backbone. Only one such brick may act on a row at a site. On disk it is PEFT's format, written and
read by PEFT's own functions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load, save
from torch import Tensor

from cfm_train.backbone.plugs import Plug
from cfm_train.bricks.brick import LINEAR, Brick, json_bytes
from cfm_train.bricks.peft_layers import Layers, peft_speaks, sites_by_module
from cfm_train.bricks.peft_modules import PREFIX, TASK_TYPES
from cfm_train.bricks.peft_options import DECIDED, REFUSED, check_options, refuse_features
from cfm_train.bricks.peft_prompt import VirtualPrompt, prompt_site
from cfm_train.bricks.peft_tree import Offset, find_offset
from cfm_train.config.types import TunerOptions
from cfm_train.errors import UserError
from cfm_train.library.peft_catalogue import config_fields
from cfm_train.library.peft_format import CONFIG_FILE, TENSOR_FILE, aside_tensors, function_of

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.backbone.sites import Site


class Peft(Brick):
    """One of PEFT's tuners on chosen sites.

    Args:
        tuner: PEFT's name of it in small letters, such as ``vera``.
        options: keys of the tuner's PEFT config; null leaves one to PEFT.
        sites: patterns of linear sites (of norms for ``ln_tuning``, ``embed`` for ``p_tuning``).
            PEFT adapts whole modules: a part of a fused one stands for all of it.
        layers: numbers of the layers to use, negative ones from the top; None for all.
    """

    starts_as_identity = False  # most tuners do: docs/bricks.md says which

    def __init__(
        self, tuner: str, options: TunerOptions, sites: list[str], layers: list[int] | None
    ) -> None:
        super().__init__(tuner=tuner, options=options, sites=sites, layers=layers)
        self.engine: Layers | VirtualPrompt | None = None
        self.config: dict[str, Any] = {}

    def build(self, backbone: Backbone) -> Self:
        """Has PEFT make the tuner's parameters.

        Raises:
            UserError: PEFT refuses the options or a site.
        """
        hyper = self.hyper
        check_options(hyper["tuner"], hyper["options"])
        values = {key: value for key, value in hyper["options"].items() if value is not None}
        if hyper["tuner"] == "p_tuning":
            site = prompt_site(backbone, hyper["sites"], hyper["layers"])
            values |= {"token_dim": site.out_features, "num_transformer_submodules": 1}
            values = {"encoder_hidden_size": site.out_features} | values
            self._start(values, backbone, site, Offset())
            return self
        sites = whole_sites(backbone, hyper["sites"], hyper["layers"], hyper["tuner"])
        values["target_modules"] = targets(backbone, sites)
        if "fan_in_fan_out" in config_fields()[hyper["tuner"].upper()]:
            values["fan_in_fan_out"] = any(site.transposed for site in sites)
        if hyper["tuner"] == "adalora":  # PEFT insists on a length, the run tells it
            rest = (values.get("tinit") or 0) + (values.get("tfinal") or 0)
            values["total_step"] = rest + 1
        self._start(values, backbone, None, Offset())
        missed = {site.name for site in sites} - set(self.site_names)
        if missed:
            raise UserError(
                f"PEFT's {hyper['tuner']} passes over the site '{min(missed)}' of the backbone "
                f"'{backbone.id}': choose other sites, or brick=lora."
            )
        return self

    def _start(
        self, values: dict[str, Any], backbone: Backbone, site: Site | None, offset: Offset
    ) -> None:
        """Makes the engine from the values of a PEFT config."""
        tuner, options = self.hyper["tuner"], self.hyper["options"]
        values = {"task_type": TASK_TYPES[backbone.family], **values, "peft_type": tuner.upper()}
        with peft_speaks(tuner, backbone):
            config: PeftConfig = PEFT_TYPE_TO_CONFIG_MAPPING[values.pop("peft_type")](**values)
        # Kept as it is now: PEFT shortens and completes the one that it works with.
        self.config = config.to_dict()
        if site is not None:
            self.engine = VirtualPrompt(config, backbone, site)  # type: ignore[arg-type]
        else:
            schedule = options.get("tinit"), options.get("tfinal")
            self.engine = Layers(config, backbone, offset, schedule)
        self.site_names = self.engine.site_names
        self.to(backbone.device)

    @property
    def running(self) -> Layers | VirtualPrompt:
        """What `build` made."""
        if self.engine is None:
            raise RuntimeError("build the brick before using it")
        return self.engine

    def plugs(self) -> Iterable[Plug]:
        """PEFT's layers at their sites, or the virtual tokens."""
        return self.running.plugs()

    def penalty(self) -> Tensor | None:
        """What the tuner adds to the loss while training, None for most."""
        return self.running.penalty()

    def after_step(self, step: int, total: int) -> None:
        """Lets the tuner share out its ranks (AdaLoRA)."""
        self.running.after_step(step, total)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors as PEFT names them."""
        return self.running.state()

    def body_files(self) -> dict[str, bytes]:
        """``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT writes them."""
        tensors = {name: value.cpu() for name, value in self.tensors().items()}
        config = {**self.config, "inference_mode": True}
        config.pop("runtime_config", None)  # only ever valid while PEFT runs
        if isinstance(self.engine, Layers) and self.engine.rank_pattern is not None:
            config["rank_pattern"] = self.engine.rank_pattern
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
        return {CONFIG_FILE: json_bytes(plain), TENSOR_FILE: save(tensors)}

    @classmethod
    def restore(
        cls, interface: Mapping[str, Any], files: Mapping[str, bytes], backbone: Backbone
    ) -> Self:
        """A brick from PEFT's two files, trained here or anywhere else.

        Raises:
            UserError: the tuner does not run as a brick, the adapter asks for what its layers do
                not compute, or it belongs to another backbone.
        """
        config = json.loads(files[CONFIG_FILE])
        tuner = str(config["peft_type"]).lower()
        if tuner in REFUSED:
            raise UserError(f"The adapter is of PEFT's {tuner}: {REFUSED[tuner]}.")
        refuse_features(config, f"The adapter ({tuner})")
        brick = cls(**(interface.get("hyper") or _hyper(tuner, config)))
        tensors = load(files[TENSOR_FILE])
        for name in aside_tensors(config, tensors):
            del tensors[name]
        values = {**config, "modules_to_save": None, "inference_mode": tuner == "p_tuning"}
        if tuner == "p_tuning":
            site = prompt_site(backbone, ["embed"], None)
            brick._start(values, backbone, site, Offset())
        else:
            brick._start(values, backbone, None, _offset(config, tensors, backbone))
        brick.running.set_state(tensors)
        brick.config = config
        return brick


def whole_sites(
    backbone: Backbone, patterns: list[str], layers: list[int] | None, tuner: str
) -> list[Site]:
    """The whole sites that patterns choose; parts of a fused module choose the module.

    Raises:
        UserError: a pattern matches nothing, or a site that the tuner does not adapt.
    """
    kinds = ("norm",) if tuner == "ln_tuning" else LINEAR
    whole = sites_by_module(backbone)
    found: dict[str, Site] = {}
    for site in backbone.sites.select(patterns, layers):
        if site.kind not in kinds:
            raise UserError(
                f"Site '{site.name}' is a {site.kind}, and PEFT's {tuner} adapts "
                f"{'norms' if tuner == 'ln_tuning' else 'linear layers'}: choose sites such as "
                f"{'norm' if tuner == 'ln_tuning' else 'attn.q, attn.v or ffn.down'}."
            )
        name = whole[site.module]
        found[name] = backbone.sites[name]
    return list(found.values())


def targets(backbone: Backbone, sites: list[Site]) -> list[str]:
    """What PEFT's ``target_modules`` must say for exactly these sites.

    PEFT takes a name for the end of a path: a role in all layers is one name where that fits no
    other module, as people write it.
    """
    paths = [name for name, _ in backbone.model.named_modules()]
    wanted = {site.module for site in sites}
    roles: dict[str, list[str]] = {}
    for site in sites:
        role = ".".join(word for word in site.name.split(".") if not word.isdigit())
        roles.setdefault(role, []).append(site.module)
    names: set[str] = set()
    for modules in roles.values():
        end = _common_end(modules)
        fits = {path for path in paths if path == end or path.endswith(f".{end}")}
        names |= {end} if end and fits <= wanted else set(modules)
    return sorted(names)


def _common_end(paths: list[str]) -> str:
    """The longest run of words that all paths end with."""
    end: list[str] = []
    for words in zip(*(reversed(path.split(".")) for path in paths), strict=False):
        if len(set(words)) > 1:
            break
        end.insert(0, words[0])
    return ".".join(end)


def _offset(config: Mapping[str, Any], tensors: Mapping[str, Tensor], backbone: Backbone) -> Offset:
    """How an adapter's names differ from the backbone's."""
    targets = config.get("target_modules") or []
    return find_offset(
        [name.removeprefix(PREFIX) for name in tensors],
        [] if isinstance(targets, str) else targets,
        sites_by_module(backbone),
    )


def _hyper(tuner: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of an adapter that PEFT trained."""
    options = {key: v for key, v in function_of(config).items() if key not in DECIDED}
    return {"tuner": tuner, "options": options, "sites": [], "layers": None}
