"""The flat parameters of a merge: what a rule, a sparsifier and all merges have, and their
defaults.

``merge.density`` belongs to the sparsifier, ``merge.elect`` to the rule ties, ``merge.space`` to
every merge; the names of the three never meet (tested). The defaults stand in ``conf/rule/`` and
``conf/sparsify/``. No torch here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError, create_model, model_validator

from cfm_train.config import signature
from cfm_train.config.section import Section
from cfm_train.config.types import Count, Positive
from cfm_train.errors import UserError, nearest

#: Where a method's file lies and which class it derives from.
ROOMS = {"rule": ("merging", "Rule"), "sparsify": ("merging/sparsify", "Sparsifier")}


class Merging(Section):
    """What every merge has; the parameters of its rule and sparsifier are added (see
    `model_of`)."""

    model_config = ConfigDict(extra="allow")

    rule: str
    sparsify: str
    space: Literal["auto", "delta", "core", "knots", "cat", "parameters"]
    scope: Literal["tensor", "layer", "brick"]
    rank: Positive | None
    fold: Literal["sqrt", "b"]
    scale: float
    normalize: bool
    equal: Literal["mean", "one"] | None
    filters: list[list[Any]] | None
    seed: Count | None

    @model_validator(mode="after")
    def _no_weights(self) -> Merging:
        """A rule that takes no weights is given none.

        Raises:
            UserError: it would leave filters or a default weight unread.
        """
        if signature.constants("merging", self.rule, "Rule").get("weightless", False):
            for key in ("equal", "filters"):
                if getattr(self, key) is not None:
                    raise UserError(
                        f"rule={self.rule} takes no weights: leave merge.{key} at null."
                    )
        return self

    @model_validator(mode="after")
    def _chances(self) -> Merging:
        """Probabilities of being kept, ``density ± epsilon``, lie between 0 and 1.

        Raises:
            UserError: they do not.
        """
        density, epsilon = getattr(self, "density", 0.0), getattr(self, "epsilon", 0.0)
        room = min(density, 1 - density)
        if 0 < density < 1 and epsilon > room:
            raise UserError(
                f"merge.density={density:g} and merge.epsilon={epsilon:g} give probabilities "
                f"outside of 0 to 1: make epsilon {room:.3g} or smaller."
            )
        return self


class ModelMerging(Merging):
    """What a merge of whole models has besides."""

    dtype: Literal["float32", "bfloat16", "float16"] | None


def own_arguments(room: str, name: str) -> dict[str, Any]:
    """The parameters of a rule or sparsifier with their types, from its source."""
    base = next(base for known, base in ROOMS.values() if known == room)
    return signature.arguments(room, name, base)


def methods(key: str) -> tuple[str, ...]:
    """The rules (``rule``) or sparsifiers (``sparsify``) that exist."""
    room, base = ROOMS[key]
    return signature.kinds(room, base)


@functools.cache
def model_of(rule: str, sparsify: str, base: type[Merging] = Merging) -> type[Merging]:
    """The schema of merges by a rule with a sparsifier.

    Args:
        rule: of ``merging/``.
        sparsify: of ``merging/sparsify/``.
        base: what every merge of the operation has.
    """
    fields: dict[str, Any] = {"rule": (Literal[rule], ...), "sparsify": (Literal[sparsify], ...)}
    for key, name in (("rule", rule), ("sparsify", sparsify)):
        fields |= {k: (v, ...) for k, v in own_arguments(ROOMS[key][0], name).items()}
    model = create_model(f"{base.__name__}_{rule}_{sparsify}", __base__=base, **fields)
    model.model_config["extra"] = "forbid"
    model.model_rebuild(force=True)
    return model


def check_methods(parameters: Mapping[str, Any], prefix: str = "merge.") -> None:
    """Refuses a rule or sparsifier that does not exist.

    Raises:
        UserError: with the nearest one.
    """
    for key in ROOMS:
        name = parameters.get(key)
        if name not in methods(key):
            raise UserError(
                f"{prefix}{key}: there is no {key} '{name}'.{nearest(str(name), methods(key))}"
            )


def check(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Every parameter in the type that its method names.

    Raises:
        UserError: one is unknown, missing or does not fit.
    """
    check_methods(parameters, prefix="merge: ")
    model = model_of(parameters["rule"], parameters["sparsify"])
    try:
        return model.model_validate(thawed(parameters)).model_dump()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"][:1]))
    if key == "heads":
        raise UserError(
            f"heads={parameters[key]} trains heads when a merge is stored, so a configuration "
            f"cannot ask for it: recipe=merge/{parameters['rule']} … heads=refit name=NAME, then "
            "name that brick."
        )
    if first["type"] == "extra_forbidden":
        raise UserError(
            f"merge({parameters['rule']}, …) does not know the parameter '{key}'."
            f"{nearest(key, model.model_fields)}"
        )
    if first["type"] == "missing":
        raise UserError(f"merge({parameters['rule']}, …) lacks the parameter '{key}'.")
    message = first["msg"].removeprefix("Input should be ")
    raise UserError(f"merge({parameters['rule']}, …): {key} must be {message}.")


def check_together(parameters: Mapping[str, Any], low_rank: bool) -> None:
    """Refuses choices that do not go together, before anything is loaded; the engine does too.

    Args:
        parameters: all of a merge of bricks.
        low_rank: whether the bricks are of kind ``lora``.

    Raises:
        UserError: the rule or sparsifier does not work in the space or over the scope.
    """
    rule, sparsify = parameters["rule"], parameters["sparsify"]
    space, scope = parameters["space"], parameters["scope"]
    facts = signature.constants("merging", rule, "Rule")
    adds_up = facts.get("linear", False) and sparsify == "none"
    if space == "cat" and not adds_up:
        raise UserError(
            "merge.space=cat adds updates up as they are: it goes with rule=linear or "
            "rule=task_arithmetic and sparsify=none; use merge.space=delta."
        )
    keeps_shapes = space in ("cat", "parameters") or (space == "auto" and not low_rank)
    if keeps_shapes and parameters["rank"] is not None:
        what = "cat keeps every rank" if space == "cat" else "parameters keeps the bricks' shapes"
        raise UserError(
            f"merge.space={what}: leave merge.rank out"
            + (", or use merge.space=delta." if low_rank else ".")
        )
    if space == "knots" and facts.get("ranks", False):
        raise UserError(
            f"rule={rule} keeps the largest singular values of an update, and in merge.space=knots "
            "all are alike: use merge.space=delta or merge.space=core."
        )
    rows = signature.constants("merging/sparsify", sparsify, "Sparsifier").get("rows", False)
    for what, bound in (
        (f"rule={rule}", facts.get("matrices", False) or facts.get("needs") is not None),
        (f"sparsify={sparsify}", rows),
    ):
        if scope != "tensor" and bound:
            raise UserError(f"{what} works on one tensor at a time: use merge.scope=tensor.")


def check_count(rule: str, count: int, what: str = "bricks") -> None:
    """Refuses a number of inputs that a rule does not take.

    Raises:
        UserError: too few or too many.
    """
    facts = signature.constants("merging", rule, "Rule")
    fewest, most = facts.get("fewest", 1), facts.get("most")
    if count < fewest or (most is not None and count > most):
        takes = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
        raise UserError(f"rule={rule} takes {takes} {what}, and there are {count}.")


def default_weights(given: object, count: int, equal: str | None, rule: str) -> object:
    """The weights as given, or the rule's own where none are.

    Raises:
        UserError: weights for a rule that takes none.
    """
    if given is None:
        return [1 / count if equal == "mean" else 1.0] * count
    if equal is None:
        raise UserError(f"rule={rule} takes no weights: leave weights out.")
    return given


def complete(rule: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a merge, from the options' YAML where they were not given.

    Args:
        rule: an option of ``conf/rule``, such as ``ties/mergekit``.
        given: parameters that replace the option's; another ``sparsify`` brings its own.

    Raises:
        UserError: there is no such rule, or it has no such parameter.
    """
    from cfm_train.config.compose import option

    chosen = {"sparsify": str(given["sparsify"])} if "sparsify" in given else {}
    section = option("rule", rule, package="merge", choices=chosen)
    return check({**section, **{k: v for k, v in given.items() if k != "sparsify"}})


def thawed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with lists for a frozen tree's tuples."""

    def thaw(value: Any) -> Any:
        return [thaw(one) for one in value] if isinstance(value, list | tuple) else value

    return {key: thaw(value) for key, value in parameters.items()}
