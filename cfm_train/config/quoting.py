"""Free text in an override reaches the run exactly as it was typed.

Hydra's override grammar reads ``name=1e5`` as 100000.0, ``prompt=a, b`` as a sweep and
``bricks=[merge(ties,[a,b])]`` as a syntax error. So the value of every key that the schema calls a
string is turned into a token of plain letters before Hydra sees it, and back after composition. The
token carries the text itself (in hex), so it survives interpolation, pickling and a launcher that
sends the override to another machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cfm_train.errors import UserError

_TOKEN = re.compile(r"cfmtext_((?:[0-9a-f]{2})*)_")
_OVERRIDE = re.compile(r"^(\+{0,2})([A-Za-z_][\w.]*)=(.*)$", re.DOTALL)
_SWEEP = re.compile(r"^(choice|range|glob|shuffle|sort|interval)\(.*\)$", re.DOTALL)
_CLOSING = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class TextKind:
    """How the text of one key is read.

    Attributes:
        many: a list of strings is allowed, written ``[a, b]``.
        one: a single string is allowed.
        nullable: the word ``null`` means nothing, not the text "null".
        prose: a sentence, whose commas never mean a sweep (``-m`` sweeps over every other text).
    """

    many: bool = False
    one: bool = True
    nullable: bool = False
    prose: bool = False

    def wider(self, other: TextKind) -> TextKind:
        """What takes all that either takes; the schema of each operation judges."""
        return TextKind(
            self.many or other.many,
            self.one or other.one,
            self.nullable or other.nullable,
            self.prose or other.prose,
        )


def encode(text: str) -> str:
    """One text as a token that Hydra's grammar takes for a plain word."""
    return f"cfmtext_{text.encode('utf-8', 'surrogateescape').hex()}_"


def decode(value: Any) -> Any:
    """Every token inside a string, list or mapping turned back into the text it stands for."""
    if isinstance(value, str):
        return _TOKEN.sub(
            lambda hit: bytes.fromhex(hit[1]).decode("utf-8", "surrogateescape"), value
        )
    if isinstance(value, Mapping):
        return {decode(key): decode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [decode(item) for item in value]
    return value


def quote(override: str, kinds: Mapping[str, TextKind], *, sweep: bool = False) -> str:
    """One override with its free text made safe for Hydra.

    Args:
        override: what the person typed, ``key=value``.
        kinds: the keys whose value is free text (`cfm_train.config.free_text.text_keys`).
        sweep: whether ``-m`` was given: then ``a,b`` means one job for each, except in prose.

    Returns:
        the override with tokens in place of the text; any other override unchanged.

    Raises:
        UserError: a list key was given several texts without brackets.
    """
    match = _OVERRIDE.match(override)
    if match is None or match[2] not in kinds:
        return override
    plus, key, value = match.groups()
    kind = kinds[key]
    if not sweep or kind.prose:
        return f"{plus}{key}={_one(key, value, kind)}"
    if _SWEEP.match(value):
        return override
    return f"{plus}{key}=" + ",".join(_one(key, part, kind) for part in split(value))


def _one(key: str, value: str, kind: TextKind) -> str:
    if kind.nullable and value == "null":
        return value
    if kind.many and value.startswith("[") and value.endswith("]"):
        inner = value[1:-1]
        parts = [unquoted(part) for part in split(inner)] if inner.strip() else []
        return "[" + ",".join(encode(part) for part in parts) + "]"
    if kind.one:
        return encode(value)
    if len(split(value)) > 1:
        raise UserError(f"{key}={value} names several values: write {key}=[{value}].")
    return f"[{encode(value)}]"


def unquoted(text: str) -> str:
    """An element of a list without the blanks and the quotes around it."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def split(text: str) -> list[str]:
    """Cuts at the commas that stand outside every bracket and quoted part.

    >>> split("merge(ties,[a,b]), c")
    ['merge(ties,[a,b])', 'c']
    """
    parts, start, closing, quoted = [], 0, list[str](), ""
    for at, char in enumerate(text):
        if quoted:
            quoted = "" if char == quoted else quoted
        elif char in "'\"" and not text[start:at].strip():
            quoted = char  # a quote opens a quoted part only where an element starts: it's, 5'
        elif char in _CLOSING:
            closing.append(_CLOSING[char])
        elif closing and char == closing[-1]:
            closing.pop()
        elif char == "," and not closing:
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()]
