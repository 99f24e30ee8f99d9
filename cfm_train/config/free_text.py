"""Which keys hold free text, told by their types; Hydra's grammar is kept off them (`quoting`)."""

from __future__ import annotations

import functools
import types
import typing
from typing import Annotated, Any

from pydantic import BaseModel

from cfm_train.config.quoting import TextKind
from cfm_train.config.schema import OPERATIONS
from cfm_train.config.types import Prose


@functools.cache
def text_keys() -> dict[str, TextKind]:
    """Every key whose value is free text, in dotted form, over all operations.

    >>> text_keys()["name"].one, text_keys()["bricks"].many
    (True, True)
    """
    found: dict[str, TextKind] = {}
    for model in OPERATIONS.values():
        for key, kind in text_fields(model).items():
            found[key] = found[key].wider(kind) if key in found else kind
    del found["operation"], found["recipe"]
    return found


def text_fields(model: type[BaseModel], prefix: str = "") -> dict[str, TextKind]:
    """The free-text keys of one model and of the sections in it."""
    found: dict[str, TextKind] = {}
    for name, field in model.model_fields.items():
        annotation: Any = field.annotation
        if field.metadata:
            annotation = Annotated[(annotation, *field.metadata)]
        for part in _parts(annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= text_fields(part, f"{prefix}{name}.")
        if kind := text_kind(annotation):
            found[f"{prefix}{name}"] = kind
    return found


def text_kind(annotation: Any) -> TextKind | None:
    """How the text of a key with this annotation is read; None where Hydra's grammar reads it."""
    parts = _parts(annotation)
    one, many = str in parts, list[str] in parts or list[list[str]] in parts
    if list[list[str]] in parts or not (one or many):
        return None
    prose = any(isinstance(part, Prose) for part in parts)
    return TextKind(many=many, one=one, nullable=types.NoneType in parts, prose=prose)


def _parts(annotation: Any) -> list[Any]:
    """The members of a union with their ``Annotated`` opened; the metadata stand among them."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [part for member in typing.get_args(annotation) for part in _parts(member)]
    if origin is Annotated:
        inner, *metadata = typing.get_args(annotation)
        return [*_parts(inner), *metadata]
    return [annotation]
