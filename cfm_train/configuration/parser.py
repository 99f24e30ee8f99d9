"""Text to tree: ``merge(ties, [sst2@1f2c, trec], density=0.2)``.

Names of bricks (``my-brick``, ``20news``, ``sst2@1f2c``) are not Python's, so every word is first
replaced by a plain identifier that only points back to it. What is left is read with `ast`, as a
tree and nothing more: no text of the person's ever reaches the interpreter, and nothing is
evaluated.
"""

from __future__ import annotations

import ast
import json
import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import NoReturn

from cfm_train.configuration.expression import (
    CONSTANTS,
    FUNCTIONS,
    BrickRef,
    Call,
    Expression,
    Value,
    is_bare,
)
from cfm_train.errors import UserError, nearest

_TOKEN = re.compile(
    r"""(?P<space>\s+)
      | (?P<word>[A-Za-z0-9_.@+/-]+)
      | (?P<quoted>"(?:[^"\\]|\\.)*"|'[^'\\]*')
      | (?P<mark>[()\[\],=])""",
    re.VERBOSE | re.ASCII,
)
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LONGEST = 100_000


def parse(text: str) -> Expression:
    """Reads a configuration.

    Args:
        text: a brick (``sst2``, ``sst2@1f2c``) or a call of ``merge``, ``stitch`` or ``route``.

    Returns:
        The frozen tree; versions stand as they were written, see `pin.pin`.

    Raises:
        UserError: one sentence that points at the place.
    """
    return _Reader(text).read()


@dataclass(frozen=True)
class _Word:
    """A word or a quoted text, and where it stands."""

    text: str
    quoted: bool
    at: int


class _Reader:
    """One reading of one text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words: list[_Word] = []
        self.starts: list[int] = []  # where each token begins in the source for `ast` …
        self.origins: list[int] = []  # … and in the text
        self.source = ""

    def read(self) -> Expression:
        """The tree of the whole text."""
        if not self.text.strip():
            raise UserError(
                "The configuration is empty: give a brick's name, or a call such as merge(linear, "
                "[a, b])."
            )
        if len(self.text) > _LONGEST:
            raise UserError(
                f"The configuration has {len(self.text)} characters, more than the {_LONGEST} "
                "allowed."
            )
        self._replace_words()
        try:
            tree = ast.parse(self.source, mode="eval").body
            return self._expression(tree)
        except SyntaxError as error:
            self._refuse(self._origin((error.offset or 1) - 1), _explain(error))
        except (RecursionError, MemoryError):
            self._refuse(0, "it is nested too deeply")

    def _replace_words(self) -> None:
        """Fills `source`, in which the i-th word is ``_i`` and every other token is as it was."""
        at = 0
        while at < len(self.text):
            match = _TOKEN.match(self.text, at)
            if match is None:
                quote = self.text[at] in "'\""
                self._refuse(
                    at, "the text is not closed" if quote else "this character means nothing here"
                )
            if match.lastgroup != "space":
                self.starts.append(len(self.source))
                self.origins.append(at)
                self.source += match[0] if match.lastgroup == "mark" else f"_{len(self.words)} "
            if match.lastgroup == "word":
                self.words.append(_Word(match[0], False, at))
            elif match.lastgroup == "quoted":
                self.words.append(_Word(self._unquoted(match[0], at), True, at))
            at = match.end()

    def _unquoted(self, quoted: str, at: int) -> str:
        if quoted[0] == "'":
            return quoted[1:-1]
        try:
            return str(json.loads(quoted))
        except ValueError:
            self._refuse(at, "the text between the quotes has an unknown escape or a line break")

    def _expression(self, node: ast.expr) -> Expression:
        if isinstance(node, ast.Name):
            return self._brick(self._word(node))
        if isinstance(node, ast.Call):
            return self._call(node)
        return self._refuse(
            self._place(node), "a brick or a call such as merge(linear, [a, b]) belongs here"
        )

    def _brick(self, word: _Word) -> BrickRef:
        name, at, version = word.text.partition("@")
        try:
            return BrickRef(name, version if at else None)
        except UserError as error:
            self._refuse(word.at, str(error))

    def _call(self, node: ast.Call) -> Call:
        if not isinstance(node.func, ast.Name):
            self._refuse(self._place(node), "only merge, stitch and route can be called")
        function = self._word(node.func)
        fn = function.text
        if fn not in FUNCTIONS:
            self._refuse(
                function.at, f"'{fn}' is no function of a configuration.{nearest(fn, FUNCTIONS)}"
            )
        shape = f"{fn}(RULE, [a, b])" if FUNCTIONS[fn] else f"{fn}([a, b])"
        for extra in node.args[2 if FUNCTIONS[fn] else 1 :]:
            self._refuse(
                self._place(extra),
                f"{fn} is written {shape}, with parameters as name=value after that",
            )
        if len(node.args) < (2 if FUNCTIONS[fn] else 1):
            self._refuse(function.at, f"{fn} is written {shape}, and something is missing")
        rule = None
        if FUNCTIONS[fn]:
            if not isinstance(node.args[0], ast.Name):
                self._refuse(
                    self._place(node.args[0]), f"{fn} is written {shape}, and its rule is a word"
                )
            rule = self._word(node.args[0]).text
        listed = node.args[-1]
        if not isinstance(listed, ast.List):
            self._refuse(
                self._place(listed), f"{fn} is written {shape}, with its bricks in square brackets"
            )
        args = tuple(self._expression(one) for one in listed.elts)
        params = []
        for keyword in node.keywords:
            name = self.words[int((keyword.arg or "_0")[1:])]
            params.append((name.text, self._value(keyword.value)))
        try:
            return Call(fn, rule, args, tuple(params))
        except UserError as error:
            self._refuse(function.at, str(error))

    def _value(self, node: ast.expr) -> Value:
        if isinstance(node, ast.List):
            return tuple(self._value(one) for one in node.elts)
        if not isinstance(node, ast.Name):
            self._refuse(
                self._place(node),
                "a value is a number, a text, true, false, null or a list of these",
            )
        word = self._word(node)
        if word.quoted:
            return word.text
        if word.text.lower() in CONSTANTS:
            return CONSTANTS[word.text.lower()]
        try:
            if _INTEGER.fullmatch(word.text):
                return int(word.text)
            if _NUMBER.fullmatch(word.text) and math.isfinite(float(word.text)):
                return float(word.text)
        except ValueError:  # more digits than Python converts
            self._refuse(word.at, "this number is too long")
        if not is_bare(word.text):
            self._refuse(
                word.at, f"'{word.text}' is no number and no plain word: put a text in quotes"
            )
        return word.text

    def _word(self, node: ast.Name) -> _Word:
        return self.words[int(node.id[1:])]

    def _place(self, node: ast.expr) -> int:
        return self._origin(node.col_offset)

    def _origin(self, offset: int) -> int:
        """The place in the text of a place in the source."""
        index = bisect_right(self.starts, offset) - 1
        return self.origins[max(index, 0)]

    def _refuse(self, at: int, what: str) -> NoReturn:
        found = _TOKEN.match(self.text, at)
        shown = (found[0] if found else self.text[at : at + 1])[:40]
        before, after = self.text[:at][-40:], self.text[at + len(shown) :][:40]
        end = "" if what.endswith((".", "?")) else "."
        raise UserError(
            f"The configuration cannot be read at character {at + 1}, {before}»{shown}«{after}: "
            f"{what}{end}"
        ) from None


def _explain(error: SyntaxError) -> str:
    """What a person needs of the interpreter's message about a source that holds no words of
    theirs."""
    message = str(error.msg)
    if (
        "never closed" in message
        or "EOF" in message
        or "does not match" in message
        or "unmatched" in message
    ):
        return "the brackets do not match"
    if "positional argument follows" in message:
        return "parameters (name=value) come after the bricks"
    if "too many nested" in message or "too complex" in message:
        return "it is nested too deeply"
    return "this cannot stand here (is a comma missing, here or just after?)"
