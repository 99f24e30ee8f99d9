"""Turns what Hydra, OmegaConf and YAML raise into the one sentence that a person reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    GrammarParseError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from cfm_train.config.quoting import decode
from cfm_train.errors import UserError, nearest


@contextmanager
def translated() -> Iterator[None]:
    """Inside it, every error of Hydra, OmegaConf and YAML leaves as a `UserError`."""
    try:
        yield
    except yaml.YAMLError as error:
        raise UserError(_yaml(error)) from None
    except (HydraException, OmegaConfBaseException) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, yaml.YAMLError):
                raise UserError(_yaml(cause)) from None
            cause = cause.__cause__ or cause.__context__
        raise UserError(decode(_hydra(error))) from None
    except (AssertionError, LookupError, TypeError, ValueError) as error:
        # Hydra lets these through, for instance where a key is put into something that has no keys.
        raise UserError(decode(f"The overrides do not fit together: {error}.")) from None


def _yaml(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if mark is None:
        return f"A YAML file cannot be read: {problem}."
    return f"{mark.name}, line {mark.line + 1}: not valid YAML, {problem}."


def _hydra(error: BaseException) -> str:
    text = re.sub(r"\s*\n\s*See https?:\S+.*", "", str(error), flags=re.DOTALL)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:  # Hydra wraps some errors of OmegaConf without a word of its own
        return _hydra(error.__cause__) if error.__cause__ else f"{type(error).__name__}."
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.removeprefix("/").rpartition("/")
        inside = re.match(r"In '([^']+)'", lines[0])
        where = f"{inside[1]}: " if inside else ""
        return (
            f"{where}there is no {group or 'config'} '{name}'.{nearest(name, error.options or [])}"
        )
    if match := re.match(r"Could not override '([^']+)'\.", lines[0]):
        return (
            f"{match[1]} is a choice that this recipe does not have: leave it out or take "
            "another recipe."
        )
    if isinstance(error, OverrideParseException):
        return _override(error.override, lines)
    if lines[0].startswith("Ambiguous value for argument"):
        given = lines[0].split("'")[1].lstrip("+")
        return f"{given} names several values: put -m first to run each, or write [a,b] for a list."
    if isinstance(error, GrammarParseError):
        key = getattr(error, "full_key", None) or "A value"
        return f"{key}: an interpolation ${{…}} in it is not closed or cannot be read."
    if isinstance(error, InterpolationResolutionError):
        key = getattr(error, "full_key", None) or "a key"
        return f"{key}: {lines[0].rstrip('.')}."
    return "; ".join(lines).rstrip(".") + "."


def _override(override: str, lines: list[str]) -> str:
    """An override that Hydra's grammar refuses."""
    typed = override.lstrip("+")
    key, _, text = typed.partition("=")
    unclosed = [pair for pair in ("[]", "{}", "()") if text.count(pair[0]) != text.count(pair[1])]
    if unclosed:
        return f"{typed}: a bracket {unclosed[0]} is not closed."
    return f"{typed} cannot be read ({lines[0].rstrip('.')}): put the value in quotes, {key}='…'."


def value(given: Any) -> str:
    """A value as a person writes it in an override, cut where it is long."""
    if given is None:
        return "null"
    if isinstance(given, bool):
        return str(given).lower()
    text = str(given) if not isinstance(given, str) else f"'{given}'"
    return text if len(text) <= 60 else text[:57] + "…"
