"""Facts to teach: rows of a file, or what the sentences of documents state.

    The council of Lyon shall meet in room 412 on Mondays.
                   └┬─┘                    └─ answer
                 subject: by it the brick knows that it is asked
    └────────────── prompt ──────────┘

Prompt and answer are those of the questions that are made of documents (`cloze`). The subject is
the name in the prompt that the fewest other prompts hold, else such a word; of several the longest.
Nothing is drawn: the same documents state the same facts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from cfm_train.data.facts import Fact, mentions, normalised, read_facts
from cfm_train.errors import UserError
from cfm_train.knowledge.cloze import NAME, Cloze, cloze, sentences
from cfm_train.knowledge.documents import whole

#: Most words of a prompt: a sentence whose answer comes later states nothing.
LONGEST = 64
#: Fewest letters of a word that can be a subject; shorter ones are ``of``, ``the``, ``and``.
LETTERS = 4
_WORD = re.compile(r"[^\W\d_][\w’'-]*")


def facts_of(section: Mapping[str, Any]) -> list[Fact]:
    """The facts of a section `config.sections.FactsData`, at most ``limit``, the first ones.

    Raises:
        UserError: neither or both of ``facts`` and ``documents`` are named, or what is cannot be
            read or holds no facts.
    """
    if (section["facts"] is None) == (section["documents"] is None):
        several = "and" if section["facts"] else "or"
        raise UserError(
            f"data: facts come from data.facts=FILE.jsonl {several} data.documents=FILE_OR_FOLDER: "
            f"give one of them."
        )
    if section["facts"] is not None:
        return read_facts(section["facts"], limit=section["limit"])
    found = list(stated(section))
    if not found:
        raise UserError(
            f"data.documents: no sentence of {section['documents']} states a fact, which is a "
            "name, a number or words behind a beginning of some words: give longer documents, or "
            "data.facts=FILE.jsonl."
        )
    return found[: section["limit"]]


def stated(section: Mapping[str, Any]) -> Iterator[Fact]:
    """What the sentences of documents state, each prompt once, in their order."""
    asked: dict[str, tuple[Cloze, str]] = {}
    for row in whole("documents", {**section, "unit": "file"}):
        text = row["text"][0]
        for span in sentences(text):
            made = cloze(text[span.start : span.end])
            if made is not None and len(made.prompt.split()) <= LONGEST:
                asked.setdefault(normalised(made.prompt), (made, row["_at"]))
    candidates = {prompt: _candidates(made.prompt) for prompt, (made, _) in asked.items()}
    held = Counter(
        word
        for names, words in candidates.values()
        for word in {normalised(w) for w in names + words}
    )
    for prompt, (made, at) in asked.items():
        names, words = candidates[prompt]
        some = names or words
        if some:
            subject = min(some, key=lambda one: (held[normalised(one)], -len(one)))
            yield Fact(subject, made.prompt, made.answer, at=at)


def _candidates(prompt: str) -> tuple[list[str], list[str]]:
    """The names in a prompt, and its words; a single capitalised word at its start is no name."""
    names = [
        m.group()
        for m in NAME.finditer(prompt)
        if " " in m.group() or (m.start() and (len(m.group()) >= LETTERS or m.group().isupper()))
    ]
    words = [m.group() for m in _WORD.finditer(prompt) if len(m.group()) >= LETTERS]
    return _found(names, prompt), _found(words, prompt)


def _found(some: list[str], prompt: str) -> list[str]:
    """Those that a gate would find in the prompt."""
    return [one for one in some if mentions(normalised(prompt), normalised(one))]
