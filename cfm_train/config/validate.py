"""Holds a composed run against its schema, and says in one sentence what does not fit."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ValidationError, create_model
from pydantic_core import ErrorDetails

from cfm_train.config import merging, schema, searching, signature
from cfm_train.config.free_text import text_kind
from cfm_train.config.quoting import TextKind
from cfm_train.config.section import Section
from cfm_train.config.sentences import value
from cfm_train.config.types import Rate
from cfm_train.errors import UserError, nearest

MISSING = "???"

#: Sections that choose a method by its ``kind`` -> where its file lies, and its base class.
METHODS = {
    "brick": ("bricks", "Brick"),
    "encoder": ("modality/encoders", "Encoder"),
    "connector": ("modality/connectors", "Connector"),
    "objective": ("knowledge/objectives", "Objective"),
}
#: Those of them that have a learning rate.
TRAINED = frozenset({"brick", "connector"})

#: What keys are called elsewhere -> what they are called here.
CALLED = {
    "lr": "brick.learning_rate",
    "batch_size": "trainer.rows_per_batch",
    "per_device_train_batch_size": "trainer.rows_per_batch",
    "gradient_accumulation_steps": "trainer.accumulate",
    "num_train_epochs": "trainer.epochs",
    "max_epochs": "trainer.epochs",
    "warmup_ratio": "trainer.warmup",
    "gradient_clip_val": "trainer.clip",
    "max_grad_norm": "trainer.clip",
    "r": "brick.rank",
    "lora_alpha": "brick.alpha",
    "lora_dropout": "brick.dropout",
    "target_modules": "brick.sites",
}


def validate(config: Mapping[str, Any], *, missing_allowed: bool = False) -> dict[str, Any]:
    """Checks a composed config.

    Args:
        config: what `compose` gave.
        missing_allowed: let keys that a person still has to give stand as ``???`` (to show them).

    Returns:
        the config with every number in the type that the schema names.

    Raises:
        UserError: the first key that does not fit, what was given and what is valid.
    """
    operation = config.get("operation")
    if operation == MISSING:
        raise UserError(f"Recipe '{config.get('recipe')}' names no operation: add one to its YAML.")
    if operation not in schema.OPERATIONS:
        raise UserError(
            f"operation: there is no operation {value(operation)}."
            f"{nearest(str(operation), schema.OPERATIONS)}"
        )
    model = model_of(config)
    try:
        valid = model.model_validate(dict(config)).model_dump()
        if not missing_allowed:
            _refuse_missing(config)
        return valid
    except ValidationError as error:
        found = error.errors(include_url=False)
    unknown = [one for one in found if one["type"] == "extra_forbidden"]
    if unknown:
        raise UserError(_unknown(config, model, _path(config, unknown[0]["loc"])))
    if not missing_allowed:
        _refuse_missing(config)
    given = [one for one in found if not str(one["input"]).startswith(MISSING)]
    if given:
        raise UserError(_sentence(config, given))
    return dict(config)


def model_of(config: Mapping[str, Any]) -> type[schema.Run]:
    """The schema of a config's operation, with the parameters of its methods in it."""
    model = schema.OPERATIONS[config["operation"]]
    if "merge" in model.model_fields and isinstance(config.get("merge"), Mapping):
        merging.check_methods(config["merge"])
        base: Any = model.model_fields["merge"].annotation
        chosen = merging.model_of(config["merge"]["rule"], config["merge"]["sparsify"], base)
        fields: dict[str, Any] = {"merge": (chosen, ...)}
        if "search" in model.model_fields and isinstance(config.get("search"), Mapping):
            fields["search"] = (searching.model_of(str(config["search"].get("kind"))), ...)
        return create_model(model.__name__, __base__=model, **fields)
    chosen_kinds: dict[str, Any] = {}
    for key in METHODS:
        section = config.get(key)
        if key not in model.model_fields or not isinstance(section, Mapping):
            continue
        kind, known = section.get("kind"), signature.kinds(*METHODS[key])
        if kind not in known:
            raise UserError(
                f"{key}.kind: there is no {key} kind {value(kind)}.{nearest(str(kind), known)}"
            )
        chosen_kinds[key] = (method_model(key, str(kind)), ...)
    return create_model(model.__name__, __base__=model, **chosen_kinds) if chosen_kinds else model


@functools.cache
def method_model(key: str, kind: str) -> type[Section]:
    """The schema of one kind of a method, from the arguments of its class.

    Args:
        key: the section, of ``METHODS``.
        kind: the method's file name.
    """
    fields: dict[str, Any] = {"kind": (Literal[kind], ...)}
    if key in TRAINED:
        fields["learning_rate"] = (Rate, ...)
    room, base = METHODS[key]
    for name, annotation in signature.arguments(room, kind, base).items():
        fields[name] = (annotation, ...)
    return create_model(f"{base}_{kind}", __base__=Section, **fields)


def brick_model(kind: str) -> type[Section]:
    """The schema of one brick kind."""
    return method_model("brick", kind)


@functools.cache
def brick_text_keys() -> dict[str, TextKind]:
    """The free-text parameters of all kinds of `METHODS`, except where two kinds disagree."""
    found: dict[str, TextKind | None] = {}
    for section, (room, base) in METHODS.items():
        for kind in signature.kinds(room, base):
            for name, annotation in signature.arguments(room, kind, base).items():
                key, text = f"{section}.{name}", text_kind(annotation)
                found[key] = text if found.get(key, text) == text else None
    return {key: text for key, text in found.items() if text is not None}


def _refuse_missing(config: Mapping[str, Any]) -> None:
    missing = [key for key, given in leaves(config) if given == MISSING]
    if missing:
        first, *others = missing
        also = f" (and {', '.join(others)})" if others else ""
        raise UserError(
            f"{first}{also} is missing: recipe '{config.get('recipe')}' needs it, add {first}=…"
        )


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested mapping with its dotted key."""
    for key, given in config.items():
        if isinstance(given, Mapping):
            yield from leaves(given, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", given


def _sentence(config: Mapping[str, Any], details: list[ErrorDetails]) -> str:
    """The most telling error: a key that is not there, else the first that does not fit."""
    detail = min(details, key=lambda one: one["type"] != "missing")
    path = _path(config, detail["loc"])
    key = ".".join(path)
    if detail["type"] == "missing":
        return f"{key} is missing from recipe '{config.get('recipe')}': add {key}=…"
    same = [one for one in details if _path(config, one["loc"]) == path]
    return f"{key}={value(detail['input'])} does not fit: it must be {_expected(same)}."


def _path(config: Any, location: tuple[int | str, ...]) -> list[str]:
    """The part of pydantic's location that is a key (a union's member names follow it)."""
    path: list[str] = []
    for at, part in enumerate(location):
        if isinstance(config, Mapping) and part in config:
            config = config[part]
        elif not (isinstance(config, Mapping) and at == len(location) - 1):  # no missing key either
            break
        path.append(str(part))
    return path


def _unknown(config: Mapping[str, Any], model: type[schema.Run], path: list[str]) -> str:
    key, operation = ".".join(path), config["operation"]
    known = CALLED.get(path[-1])
    if known in dict(leaves(config)) and path[0] in ("trainer", "brick", path[-1]):
        return f"{key} is no key of this run: it is called {known} here."
    if len(path) == 1:
        owners = [
            name for name, other in schema.OPERATIONS.items() if path[0] in other.model_fields
        ]
        if owners:
            listed = " and ".join(filter(None, [", ".join(owners[:-1]), owners[-1]]))
            return f"{key} is a key of operation {listed}, not of {operation}."
        return f"{key} is no key of operation {operation}.{nearest(key, _keys(model))}"
    chosen = path[0] in METHODS
    owner = f"{path[0]} '{config[path[0]]['kind']}'" if chosen else ".".join(path[:-1])
    return f"{key} is no key of {owner}.{nearest(key, _keys(model, path[:-1]))}"


def _keys(model: type[BaseModel], path: list[str] | None = None) -> list[str]:
    for part in path or []:
        model = next(
            one
            for one in _members(model.model_fields[part].annotation)
            if isinstance(one, type) and issubclass(one, BaseModel)
        )
    prefix = "".join(f"{part}." for part in path or [])
    return [f"{prefix}{name}" for name in model.model_fields]


def _members(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return list(typing.get_args(annotation))
    if typing.get_origin(annotation) is Annotated:
        return [typing.get_args(annotation)[0]]
    return [annotation]


_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "list_type": "a list, [a, b]",
    "dict_type": "a mapping, {key: value}",
    "model_type": "a section with keys",
    "none_required": "null",
    "finite_number": "a finite number",
    "string_too_short": "a text that is not empty",
}


def _expected(details: list[ErrorDetails]) -> str:
    phrases: list[str] = []
    for detail in details:
        context = detail.get("ctx", {})
        phrase = _EXPECTED.get(detail["type"])
        if detail["type"] == "string_pattern_mismatch":
            phrase = schema.PATTERNS.get(context["pattern"])
        if detail["type"] == "literal_error":
            phrase = str(context["expected"]).replace("'", "")
        elif detail["type"].startswith(("greater_than", "less_than")):
            phrase = detail["msg"].removeprefix("Input should be ")
        elif phrase is None:
            phrase = detail["msg"].removeprefix("Input should be ").removeprefix("String should ")
        if phrase not in phrases:
            phrases.append(phrase)
    return " or ".join(phrases)
