"""How weights are found: the schema of the section ``search``, and what can be refused at once.

The methods are files in ``cfm_train/merging/search``, their defaults stand in ``conf/search``. No
torch here.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, create_model

from cfm_train.config import merging, signature
from cfm_train.config.section import Section
from cfm_train.config.types import Positive
from cfm_train.errors import UserError, nearest

ROOM, BASE = "merging/search", "Search"
#: The option that finds nothing.
NONE = "none"
#: What a search without labels is called wherever its result is shown.
ADAPTS = "adapts on test inputs"


class Searching(Section):
    """What every search has; the parameters of its method are added (see `model_of`)."""

    model_config = ConfigDict(extra="allow")

    kind: str


def methods() -> tuple[str, ...]:
    """The ways to find weights that exist."""
    return signature.kinds(ROOM, BASE)


@functools.cache
def model_of(kind: str) -> type[Searching]:
    """The schema of searches of a kind.

    Raises:
        UserError: there is no such kind.
    """
    fields: dict[str, Any] = {"kind": (Literal[kind], ...)}
    if kind != NONE:
        if kind not in methods():
            known = (NONE, *methods())
            raise UserError(f"search.kind: there is no search '{kind}'.{nearest(str(kind), known)}")
        fields["rows"] = (Positive | None, ...)
        fields |= {k: (v, ...) for k, v in signature.arguments(ROOM, kind, BASE).items()}
    model = create_model(f"Searching_{kind}", __base__=Searching, **fields)
    model.model_config["extra"] = "forbid"
    model.model_rebuild(force=True)
    return model


def facts(kind: str) -> dict[str, Any]:
    """The literal class attributes of a method: ``follows``, ``linear``, ``chosen_on``."""
    return signature.constants(ROOM, kind, BASE)


@dataclass(frozen=True)
class Axis:
    """One number that is searched.

    Attributes:
        name: ``weight of BRICK``, or a parameter of the merge such as ``scale``.
        values: what a grid tries; else the lowest and the highest value.
        parameter: whether it is a parameter of the merge.
    """

    name: str
    values: tuple[float, ...]
    parameter: bool = False


def axes_of(
    search: Mapping[str, Any], merge: Mapping[str, Any], labels: Sequence[str], given: object
) -> list[Axis]:
    """The numbers that a search over named axes goes through; none of one that follows gradients.

    Args:
        search: the section ``search``, valid.
        merge: the section ``merge``, valid.
        labels: the bricks.
        given: the weights that a person gave, or None.

    Raises:
        UserError: the rule takes no weights, a parameter is none or has other values, there is
            nothing to search or too much.
    """
    kind, grid = search["kind"], search["kind"] == "grid"
    if facts(kind).get("follows"):
        return []
    weights, space = search["weights"], search.get("space", {})
    axes = []
    if weights is not None:
        _check_weights(search, merge, given)
        values = _values("search.weights", weights, grid)
        axes += [Axis(f"weight of {label}", values) for label in labels]
    types_of = numbers_of(merge)
    for name, given_values in space.items():
        if name not in types_of:
            raise UserError(
                f"search.space: '{name}' is no number of rule={merge['rule']} with "
                f"sparsify={merge['sparsify']}.{nearest(name, types_of)}"
            )
        if types_of[name] is int and not grid:
            raise UserError(
                f"search.space: {name} takes whole numbers, which search={kind} has no use for: "
                "use search=grid."
            )
        axes.append(Axis(name, _values(f"search.space.{name}", given_values, grid), True))
    if not axes:
        raise UserError(
            f"search={kind} has nothing to search: give search.weights, or search.space={{scale: "
            "[…]}."
        )
    found = [axis for axis in axes if axis.parameter]
    for values in itertools.product(*(axis.values for axis in found)):
        merging.check({**merge, **parameters(found, values, merge)})
    count = math.prod(len(axis.values) for axis in axes)
    if grid and count > search["most"]:
        raise UserError(
            f"search=grid would try {count} combinations, more than search.most={search['most']}: "
            "give fewer values, or use search=bayes or search=cma_es."
        )
    return axes


def _check_weights(search: Mapping[str, Any], merge: Mapping[str, Any], given: object) -> None:
    kind = search["kind"]
    if merge["equal"] is None:
        raise UserError(
            f"rule={merge['rule']} takes no weights: set search.weights=null and name other "
            "numbers, as in search.space={scale: [0.5, 1.0]}."
        )
    if given is not None and not facts(kind).get("starts"):
        raise UserError(
            f"weights={given} are what search={kind} finds: leave weights out, or set "
            "search.weights=null."
        )


def _values(key: str, values: Sequence[float], grid: bool) -> tuple[float, ...]:
    if grid:
        if not values or len(set(values)) != len(values):
            raise UserError(f"{key}={list(values)}: name each value to be tried once.")
    elif len(values) != 2 or not values[0] < values[1]:
        raise UserError(f"{key}={list(values)}: give the lowest and the highest value, [0.0,1.0].")
    return tuple(values)


def numbers_of(merge: Mapping[str, Any]) -> dict[str, type]:
    """The parameters of a merge that are numbers, and whether whole ones or any."""
    model = merging.model_of(merge["rule"], merge["sparsify"])
    found: dict[str, type] = {}
    for name, field in model.model_fields.items():
        kinds = set(_plain(field.annotation))
        if name != "seed" and kinds & {int, float}:
            found[name] = float if float in kinds else int
    return found


def _plain(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [part for one in typing.get_args(annotation) for part in _plain(one)]
    if origin is Annotated:
        return _plain(typing.get_args(annotation)[0])
    return [annotation]


def parameters(
    axes: Sequence[Axis], values: Sequence[float], merge: Mapping[str, Any]
) -> dict[str, float]:
    """The merge's parameters among some axes, in their own type.

    Args:
        axes: what is searched.
        values: one for each.
        merge: the section ``merge``.
    """
    types_of = numbers_of(merge)
    found: dict[str, float] = {}
    for axis, value in zip(axes, values, strict=True):
        if axis.parameter:
            whole = types_of[axis.name] is int and float(value).is_integer()
            found[axis.name] = int(value) if whole else float(value)
    return found


def check_method(search: Mapping[str, Any], merge: Mapping[str, Any]) -> None:
    """Refuses a method that does not go with a merge, or whose library is not installed.

    Raises:
        UserError: they do not go together.
    """
    kind, rule = search["kind"], merge["rule"]
    known = facts(kind)
    linear = signature.constants("merging", rule, "Rule").get("linear")
    if (known.get("follows") or known.get("linear")) and not linear:
        raise UserError(
            f"search={kind} is for weighted sums, and rule={rule} is none: use rule=linear or "
            "rule=task_arithmetic, or search=grid, bayes or cma_es."
        )
    if known.get("follows"):
        for key, wanted in (("sparsify", "none"), ("rank", None), ("filters", None)):
            if merge[key] != wanted:
                plain = "null" if wanted is None else wanted
                raise UserError(
                    f"search={kind} follows the gradient of a plain weighted sum: set "
                    f"{'' if key == 'sparsify' else 'merge.'}{key}={plain}, or use search=grid, "
                    "bayes or cma_es."
                )
        if merge["space"] not in ("auto", "delta", "cat"):
            raise UserError(
                f"search={kind} follows the gradient of a weighted sum of updates, and "
                f"merge.space={merge['space']} merges something else: use merge.space=delta."
            )
    module = known.get("module")
    if module is not None and importlib.util.find_spec(module) is None:
        raise UserError(
            f"search={kind} needs {known['package']}, which is not installed: pip install "
            "'cfm_train[search]'."
        )
