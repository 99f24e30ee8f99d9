"""Names for the ranges that settings and brick parameters share.

A brick's ``__init__`` may annotate its arguments with them (``rank: Positive``): the value from the
YAML is then checked before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, ValidationInfo


@dataclass(frozen=True)
class Prose:
    """Marks a text that a person writes as a sentence: its commas never mean a sweep."""


#: A sentence or a template, taken exactly as typed.
Text = Annotated[str, Prose()]

#: A whole number of at least 1.
Positive = Annotated[int, Ge(1)]

#: A whole number of at least 0.
Count = Annotated[int, Ge(0)]

#: A share, both ends allowed.
Fraction = Annotated[float, Ge(0), Le(1)]

#: A share that leaves something over: dropout, a validation split.
Share = Annotated[float, Ge(0), Lt(1)]

#: A positive figure such as a learning rate.
Rate = Annotated[float, Gt(0)]

#: A figure of at least 0.
NonNegative = Annotated[float, Ge(0)]


def _known_to_peft(options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    from cfm_train.bricks.peft_options import check_options

    if isinstance(info.data.get("tuner"), str):
        check_options(info.data["tuner"], options)
    return options


#: Options of the PEFT tuner that the argument ``tuner`` before it names.
TunerOptions = Annotated[dict[str, Any], AfterValidator(_known_to_peft)]
