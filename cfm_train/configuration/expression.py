"""A configuration as a frozen tree: which bricks, combined how, with which parameters.

    merge(ties, [sst2@1f2c3d4e5f60, trec], density=0.2)
    stitch([lang, merge(linear, [sst2, mrpc], weights=[0.3, 0.7])])
    route(arrow, [sst2, trec], top_k=1)

One tree has one text (`str`), one canonical JSON and one digest; `parser.parse` reads the text
back. Two trees are equal if their canonical JSON is: 1, 1.0 and true are three different values.
"""

from __future__ import annotations

import abc
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from cfm_train.errors import UserError, nearest
from cfm_train.library.card import canonical, check_name

#: What a configuration can do with bricks, and whether it needs a rule (a merge rule, a router).
FUNCTIONS = {"merge": True, "stitch": False, "route": True}

#: Texts that need no quotes where a value stands.
WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.+-]*")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: A rule, or one of its presets: ``ties``, ``ties/mergekit``.
_RULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)?")
_PREFIX = re.compile(r"[0-9a-f]{1,12}")
#: Words that mean something else than themselves.
CONSTANTS: dict[str, bool | None] = {"true": True, "false": False, "null": None}
_NO_NUMBERS = frozenset({"nan", "inf", "infinity"})

Value: TypeAlias = "bool | int | float | str | tuple[Value, ...] | None"
Expression: TypeAlias = "BrickRef | Call"


@dataclass(frozen=True, eq=False)
class _Tree(abc.ABC):
    """What both kinds of node have in common: identity by canonical JSON."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The node as JSON values."""

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return canonical(self.to_dict())

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, 64 hexadecimal digits: the same in every process."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tree) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return int(self.digest()[:15], 16)


@dataclass(frozen=True, eq=False)
class BrickRef(_Tree):
    """A brick of the library.

    Attributes:
        name: the brick's name.
        version: the beginning of its version, all 12 digits once pinned, None for the newest.

    Raises:
        UserError: the name or the version cannot be one.
    """

    name: str
    version: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.version is not None and not _PREFIX.fullmatch(self.version):
            raise UserError(
                f"'{self.name}@{self.version}': after '@' comes the beginning of a version "
                "(up to 12 digits and letters from a to f)."
            )

    def to_dict(self) -> dict[str, Any]:
        """``{"brick": name, "version": version}``."""
        return {"brick": self.name, "version": self.version}

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


@dataclass(frozen=True, eq=False)
class Call(_Tree):
    """A combination of bricks, or of other combinations.

    Attributes:
        fn: ``merge``, ``stitch`` or ``route``.
        rule: the merge rule or the router; None for ``stitch``.
        args: what is combined, in order.
        params: the parameters by name, sorted.

    Raises:
        UserError: the shape is wrong: an unknown function, no rule, nothing to combine, weights
            that do not fit, a value that is no number.
    """

    fn: str
    rule: str | None
    args: tuple[Expression, ...]
    params: tuple[tuple[str, Value], ...] = ()

    def __post_init__(self) -> None:
        if self.fn not in FUNCTIONS:
            raise UserError(
                f"'{self.fn}' is no function of a configuration.{nearest(self.fn, FUNCTIONS)}"
            )
        if FUNCTIONS[self.fn] and self.rule is None:
            raise UserError(
                f"{self.fn} needs a rule before its list, as in {self.fn}(RULE, [a, b])."
            )
        if not FUNCTIONS[self.fn] and self.rule is not None:
            raise UserError(f"{self.fn} takes a list alone and no rule, as in {self.fn}([a, b]).")
        if self.rule is not None and not _RULE.fullmatch(self.rule):
            raise UserError(f"'{self.rule}' cannot be a rule of {self.fn}: rules are plain words.")
        if not self.args:
            raise UserError(f"{self.fn} has nothing to combine: its list is empty.")
        names = [name for name, _ in self.params]
        for name in names:
            if not _WORD.fullmatch(name):
                raise UserError(
                    f"'{name}' cannot be a parameter of {self.fn}: parameters are plain words."
                )
        if len(set(names)) != len(names):
            raise UserError(f"{self.fn} has a parameter twice: {', '.join(names)}.")
        object.__setattr__(
            self, "params", tuple(sorted((name, _frozen(value)) for name, value in self.params))
        )
        weights = dict(self.params).get("weights")
        if isinstance(weights, tuple) and len(weights) != len(self.args):
            raise UserError(
                f"{self.fn} has {len(weights)} weights for {len(self.args)} bricks: give one for "
                "each."
            )

    def to_dict(self) -> dict[str, Any]:
        """``{"call": fn, "rule": rule, "args": [...], "params": {...}}``."""
        return {
            "call": self.fn,
            "rule": self.rule,
            "args": [arg.to_dict() for arg in self.args],
            "params": dict(self.params),
        }

    def __str__(self) -> str:
        parts = [] if self.rule is None else [self.rule]
        parts.append(f"[{', '.join(map(str, self.args))}]")
        parts += [f"{name}={_text(value)}" for name, value in self.params]
        return f"{self.fn}({', '.join(parts)})"


def bricks(tree: Expression) -> Iterator[BrickRef]:
    """Every brick of a tree, from left to right, as often as it stands there."""
    if isinstance(tree, BrickRef):
        yield tree
    else:
        for arg in tree.args:
            yield from bricks(arg)


def from_json(text: str) -> Expression:
    """The tree that `to_json` was called on.

    Raises:
        UserError: it is no JSON, or not the JSON of a configuration.
    """
    try:
        return _from_dict(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"This is not the JSON of a configuration ({error}): {text[:80]}") from None


def _from_dict(node: Any) -> Expression:
    if set(node) == {"brick", "version"}:
        return BrickRef(node["brick"], node["version"])
    if set(node) != {"call", "rule", "args", "params"}:
        raise ValueError(f"a node has the keys {', '.join(sorted(node))}")
    args = tuple(_from_dict(arg) for arg in node["args"])
    return Call(node["call"], node["rule"], args, tuple(node["params"].items()))


def _frozen(value: Any) -> Value:
    """A value with tuples for lists, refused where it is none of a configuration's types."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(one) for one in value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{value} is no value of a configuration: give a finite number.")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(
        f"{value!r:.60} is no value of a configuration: give numbers, texts, true, false or lists."
    )


def _text(value: Value) -> str:
    """A value as it stands in an expression, quoted only where it must be."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, str) and is_bare(value):
        return value
    return json.dumps(value, allow_nan=False)


def is_bare(text: str) -> bool:
    """Whether a text means itself without quotes."""
    return (
        bool(WORD.fullmatch(text))
        and text.lower() not in CONSTANTS
        and text.lower() not in _NO_NUMBERS
    )
