"""Token classification: words, their tags, and where they stand in the text.

Both forms of data become one: a text, its words as spans of characters, and a tag for each word.
The text of pre-split tokens is the tokens with a blank between, which every tokenizer reads as it
read its pretraining text; the first sub-word of a word carries its tag (Devlin et al. 2019).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cfm_train.data.files import type_name
from cfm_train.data.labels import BadRow, as_label

#: A word of a text whose spans are labelled: letters and digits, or one other sign.
WORD = re.compile(r"\w+|[^\w\s]")


def from_tokens(tokens: list[Any], tags: Any) -> dict[str, Any]:
    """A row from pre-split tokens.

    Args:
        tokens: the words.
        tags: a tag for each, names or numbers; None for a row to predict.

    Raises:
        BadRow: no tokens, a token that is not text, or another number of tags than tokens.
    """
    if not tokens:
        raise BadRow("the list of tokens is empty")
    for token in tokens:
        if not isinstance(token, str) or not token.strip():
            raise BadRow(f"every token must be text, found {token!r}")
    words, position = [], 0
    for token in tokens:
        words.append([position, position + len(token)])
        position += len(token) + 1
    row = {"text": [" ".join(tokens)], "tokens": list(tokens), "words": words}
    if tags is not None:
        if not isinstance(tags, list) or len(tags) != len(tokens):
            found = len(tags) if isinstance(tags, list) else type_name(tags)
            raise BadRow(f"{len(tokens)} tokens need a list of as many tags, found {found}")
        row["label"] = [as_label(tag, True) for tag in tags]
    return row


def from_spans(text: str, spans: Any) -> dict[str, Any]:
    """A row from a text and labelled spans of its characters, tagged B-, I- and O by words.

    A span that begins or ends inside a word is widened to the whole word.

    Args:
        text: the text.
        spans: a list of ``{"start", "end", "label"}`` or ``[start, end, label]``; characters from
            0, the end not included; None for a row to predict.

    Raises:
        BadRow: a span that is malformed, outside of the text, empty of words, or over another.
    """
    words = [list(match.span()) for match in WORD.finditer(text)]
    if not words:
        raise BadRow("the text has no words")
    row = {"text": [text], "tokens": [text[a:b] for a, b in words], "words": words}
    if spans is None:
        return row
    if not isinstance(spans, list):
        raise BadRow(f"spans must be a list like [[start, end, label]], found {type_name(spans)}")
    tags: list[str | int] = ["O"] * len(words)
    for span in spans:
        start, end, label = _span(span, len(text))
        inside = [i for i, (a, b) in enumerate(words) if a < end and b > start]
        if not inside:
            raise BadRow(f"the span {start}-{end} ({label}) holds no word")
        if any(tags[i] != "O" for i in inside):
            raise BadRow(f"the span {start}-{end} ({label}) lies over another span")
        for i in inside:
            tags[i] = f"{'B' if i == inside[0] else 'I'}-{label}"
    row["label"] = tags
    return row


def _span(span: Any, length: int) -> tuple[int, int, str]:
    if isinstance(span, dict):
        span = [span.get("start"), span.get("end"), span.get("label")]
    if not isinstance(span, list) or len(span) != 3 or not isinstance(span[2], str) or not span[2]:
        raise BadRow(f"a span is {{start, end, label}} or [start, end, label], found {span!r}")
    start, end, label = span
    if any(isinstance(n, bool) or not isinstance(n, int) for n in (start, end)):
        raise BadRow(f"a span's start and end are whole numbers, found {start!r} and {end!r}")
    if not 0 <= start < end <= length:
        raise BadRow(
            f"the span {start}-{end} ({label}) is outside of the text's {length} characters"
        )
    return start, end, label


def complete(tags: list[str | int]) -> list[str | int]:
    """Adds the I- tag of every B- tag: an entity type seen only in single words can still grow."""
    inner = [f"I-{tag[2:]}" for tag in tags if isinstance(tag, str) and tag.startswith("B-")]
    return [*tags, *inner]


def first_tokens(words: Sequence[Sequence[int]], spans: Sequence[Sequence[int]]) -> list[int]:
    """Which token each word begins with.

    Args:
        words: characters ``[start, end)`` of each word, in order.
        spans: characters ``[start, end)`` of each token, in order; empty for special tokens.

    Returns:
        For each word the first token over its first characters that no earlier word has, or -1.
    """
    found, token = [], 0
    for start, end in words:
        while token < len(spans) and (
            spans[token][0] == spans[token][1] or spans[token][1] <= start
        ):
            token += 1
        hit = token < len(spans) and spans[token][0] < end
        found.append(token if hit else -1)
        token += hit
    return found
