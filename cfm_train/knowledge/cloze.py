"""Questions made from a text by rule: a sentence's beginning, and what comes next in it.

    The council shall meet in room 412 on Mondays.
    └────────────── prompt ──────┘ └─ answer

The answer is the sentence's last number, else its last capitalised name, else its last two words.
Nothing is drawn: the same text gives the same questions. A sentence whose answer stands in its
prompt already asks nothing and is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

#: Words that a full stop does not end a sentence after.
_ABBREVIATIONS = frozenset(
    {
        "Mr", "Mrs", "Ms", "Dr", "St", "Jr", "Sr", "Prof", "Gen", "Col", "Capt", "No", "Nos", "Sec",
        "Art", "Fig", "Inc", "Co", "Corp", "Ltd", "vs", "etc", "e.g", "i.e", "cf", "al",
    }
)  # fmt: skip
_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s+[\"'“‘(\[]?[A-Z0-9])")
_PARAGRAPH = re.compile(r"\n[ \t\r\f\v]*\n")
_NUMBER = re.compile(r"(?<![\w.,:$-])\d+(?:[.,:]\d+)*(?![\w-])")
NAME = re.compile(r"(?<!\S)[A-Z][\w’'-]+(?: [A-Z][\w’'-]+)*")
_CLOSING = ".,;:!?\"'”’)] "

#: Fewest words before an answer, and most characters of one.
BEFORE, LONGEST = 4, 40


@dataclass(frozen=True)
class Span:
    """A sentence's place in a text: where it begins and ends, and whether it opens a paragraph."""

    start: int
    end: int
    opens: bool


@dataclass(frozen=True)
class Cloze:
    """A question made from a sentence.

    Attributes:
        prompt: the sentence's beginning, without the blank before the answer.
        answer: what follows.
        form: ``number``, ``name`` or ``words``.
    """

    prompt: str
    answer: str
    form: str


def sentences(text: str) -> Iterator[Span]:
    """The sentences of a text in order; a blank line ends one, too."""
    start = 0
    for stop in [*(m.span() for m in _PARAGRAPH.finditer(text)), (len(text), len(text))]:
        opens = True
        for part in _parts(text, start, stop[0]):
            yield Span(*part, opens)
            opens = False
        start = stop[1]


def _parts(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The sentences of one paragraph, without the white space around them."""
    at = start
    for match in _END.finditer(text, start, end):
        before = text[at : match.start()].rsplit(maxsplit=1)
        word = before[-1].lstrip("(\"'“‘[") if before else ""
        if text[match.start()] == "." and (word in _ABBREVIATIONS or re.fullmatch("[A-Z]", word)):
            continue
        yield from _stripped(text, at, match.end())
        at = match.end()
    yield from _stripped(text, at, end)


def _stripped(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    part = text[start:end]
    if part.strip():
        yield start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())


def cloze(sentence: str) -> Cloze | None:
    """The question that a sentence gives, if it gives one."""
    words = list(re.finditer(r"\S+", sentence))
    if len(words) <= BEFORE:
        return None
    first = words[BEFORE].start()
    last = words[-2:] if len(words) > BEFORE + 1 else words[-1:]
    candidates = [
        *((m.start(), m.end(), "number") for m in reversed(list(_NUMBER.finditer(sentence)))),
        *((m.start(), m.end(), "name") for m in reversed(list(NAME.finditer(sentence)))),
        (last[0].start(), len(sentence.rstrip(_CLOSING)), "words"),
    ]
    for start, end, form in candidates:
        prompt, answer = sentence[: start - 1], sentence[start:end].rstrip(_CLOSING)
        single = sentence[start - 1] == " " and not prompt.endswith((" ", "\n", "\t"))
        if start < first or not answer or len(answer) > LONGEST or "\n" in answer or not single:
            continue
        if not re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", prompt):
            return Cloze(prompt, answer, form)
    return None
