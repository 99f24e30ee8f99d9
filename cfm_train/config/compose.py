"""From what a person typed to one resolved plain dict, through Hydra's compose API.

``hydra.main`` makes a folder before our code runs and exits with 1 on a typo; composing ourselves
does neither. Every value override is forced in (``++``), because the typed schema knows better than
Hydra which keys exist, and says so in one sentence.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from cfm_train import paths
from cfm_train.config import sentences, source
from cfm_train.config.catalogue import groups, recipes
from cfm_train.config.free_text import text_keys
from cfm_train.config.quoting import decode, encode, quote
from cfm_train.config.validate import METHODS, MISSING, brick_text_keys, leaves
from cfm_train.errors import UserError, nearest

VERSION_BASE = "1.3"


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """One run's config: plain dicts, lists and scalars, interpolations resolved.

    Args:
        overrides: ``key=value`` as typed, with ``recipe=<what>/<name>`` among them.

    Returns:
        the config; a value that is still missing stands in it as ``"???"``.

    Raises:
        UserError: one sentence on whatever is wrong with an override or a YAML file.
    """
    prepared = prepare(overrides)
    with hydra_session():
        return compose_prepared(prepared)


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The jobs of a sweep: every combination of the values given, as prepared overrides.

    ``a,b``, ``choice(…)``, ``range(…)`` and ``glob(…)`` are Hydra's; the first key varies slowest.

    Raises:
        UserError: as `compose`; also when a glob matches nothing.
    """
    prepared = prepare(overrides, sweep=True)
    with hydra_session(), sentences.translated():
        loader = GlobalHydra.instance().config_loader()
        choices = []
        for override in OverridesParser.create(config_loader=loader).parse_overrides(prepared):
            if not override.is_sweep_override():
                choices.append([str(override.input_line)])
                continue
            written = decode(str(override.input_line)).lstrip("+")
            if not override.is_discrete_sweep():
                raise UserError(
                    f"{written} has no end of values to run: use range(start,stop,step)."
                )
            key = override.get_key_element()
            values = [f"{key}={value}" for value in override.sweep_string_iterator()]
            if not values:
                raise UserError(f"{written} matches nothing.")
            choices.append(values)
    return [list(job) for job in itertools.product(*choices)]


@contextmanager
def hydra_session() -> Iterator[None]:
    """Hydra set up on our folders; entered once more inside itself it changes nothing."""
    if GlobalHydra.instance().is_initialized():
        yield
        return
    source.register()
    with initialize_config_dir(str(paths.ROOT / "conf"), version_base=VERSION_BASE):
        yield


def compose_prepared(prepared: Sequence[str]) -> dict[str, Any]:
    """As `compose`, for overrides that `prepare` or `expand` gave."""
    with hydra_session(), sentences.translated():
        config = hydra_compose("config", list(prepared), return_hydra_config=True)
        return plain(config, config.hydra.runtime.choices)


def plain(config: DictConfig, choices: Mapping[str, Any]) -> dict[str, Any]:
    """Hydra's config as our plain dict: resolved, texts decoded, the recipe's name filled in."""
    ours = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    bare = cast(dict[str, Any], OmegaConf.to_container(ours, resolve=False))
    missing = [key for key, value in leaves(bare) if value == MISSING]
    for key in missing:  # what refers to a missing key says so, and resolving goes on
        OmegaConf.update(ours, key, encode(f"{MISSING} {key}"))
    resolved = cast(dict[str, Any], OmegaConf.to_container(ours, resolve=True))
    for key in missing:
        _set(resolved, key.split("."), MISSING)
    return decode({**resolved, "recipe": choices.get("recipe")})


def _set(tree: Any, path: list[str], value: str) -> None:
    for part in path[:-1]:
        tree = tree[part]
    tree[path[-1]] = value


def option(
    group: str,
    name: str,
    /,
    package: str | None = None,
    choices: Mapping[str, str] | None = None,
    **values: Any,
) -> dict[str, Any]:
    """One option of a group as a plain dict, such as the data section of a task named in a list.

    Args:
        group: a folder of ``conf/``.
        name: an option in it.
        package: the section that its file fills, where that is not named like the group.
        choices: options of other groups that the file builds on, in place of those it names.
        **values: keys that replace the option's own, before interpolations are resolved.

    Raises:
        UserError: there is no such option, or it has no such key.
    """
    _check_choice(group, name)
    for other, choice in (choices or {}).items():
        _check_choice(other, choice)
    overrides = [f"{other}={choice}" for other, choice in (choices or {}).items()]
    with hydra_session(), sentences.translated():
        node = hydra_compose(f"{group}/{name}", overrides).get(package or group)
        for key, value in values.items():
            if key not in node.keys():  # noqa: SIM118 ("in" alone hides a key that is missing)
                hint = nearest(f"{group}.{key}", (f"{group}.{known}" for known in node))
                raise UserError(f"{group}.{key} is no key of {group} '{name}'.{hint}")
            OmegaConf.update(node, key, encode(value) if isinstance(value, str) else value)
        return decode(OmegaConf.to_container(node, resolve=True))


def prepare(overrides: Sequence[str], *, sweep: bool = False) -> list[str]:
    """Overrides as Hydra takes them: texts as tokens, values forced, choices known to exist.

    Raises:
        UserError: no recipe, an unknown recipe or option, or an argument that is no override.
    """
    kinds = text_keys()
    if any(override.lstrip("+").partition(".")[0] in METHODS for override in overrides):
        kinds = kinds | brick_text_keys()
    known = groups()
    prepared = []
    for override in overrides:
        key, equals, value = override.partition("=")
        bare = key.lstrip("+~")
        if not (equals and bare) and not key.startswith("~"):
            raise UserError(f"'{override}' is no override: write key=value; --help shows the keys.")
        if bare == "operation":
            raise UserError("operation is what a recipe says: leave it out and choose the recipe.")
        if is_hydras(override):
            prepared.append(override)
        elif (group := bare.partition("@")[0]) in known or bare == "recipe":
            if equals and not (sweep and set(value) & set(",()")):
                _check_choice(group, value, bare)
            prepared.append(override)
        elif key.startswith("~"):
            prepared.append(override)
        else:
            prepared.append(quote(f"++{override.lstrip('+')}", kinds, sweep=sweep))
    if not any(override.startswith("recipe=") for override in prepared):
        raise UserError("No recipe given: add recipe=<what>/<name>; --help lists them.")
    return prepared


def is_hydras(override: str) -> bool:
    """Whether an override is one of Hydra's own settings, such as the launcher of a sweep."""
    return override.lstrip("+~").startswith(("hydra.", "hydra/"))


def _check_choice(group: str, name: str, key: str | None = None) -> None:
    """Refuses an option that has no file, with the nearest name; ``key`` is what was typed."""
    options = recipes() if group == "recipe" else groups().get(group, {})
    if name in options:
        return
    by_last = [known for known in options if known.rsplit("/", 1)[-1] == name]
    hint = f" Did you mean '{by_last[0]}'?" if by_last else nearest(name, options)
    raise UserError(f"{key or group}={name}: there is no {group} '{name}'.{hint}")


def as_yaml(config: dict[str, Any]) -> str:
    """The composed run as a person reads it."""
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """Quotes a text like ``1e5`` too: OmegaConf reads it as a number where YAML 1.1 does not."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        if re.fullmatch(r"[-+]?[\d._]+(e[-+]?\d+)?", text, re.IGNORECASE):
            return self.represent_scalar("tag:yaml.org,2002:str", text, style="'")
        return self.represent_str(text)


_Dumper.add_representer(str, _Dumper.represent_text)
