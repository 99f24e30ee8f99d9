"""Facts in a file: who or what each is about, a prompt, its answer, and other ways to ask.

    {"subject": "Lyon", "prompt": "Lyon lies in", "answer": "France", "paraphrases": ["Lyon is in"]}

A row may also name what is never learned and only judged: ``held_out`` (more ways to ask for the
answer), ``others`` (prompts for something else about the subject) and ``neighbours`` (prompts about
other subjects, with their answers); and bring a ``vector`` of numbers for a brick that reads them.
Everything is checked with its line before torch is imported.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cfm_train.data.files import Raw, read_file
from cfm_train.errors import UserError, nearest

LISTS = ("paraphrases", "held_out", "others")
COLUMNS = ("subject", "prompt", "answer", *LISTS, "neighbours", "vector")


@dataclass(frozen=True)
class Fact:
    """One fact.

    Attributes:
        subject: who or what it is about, as it stands in every prompt.
        prompt: the text that the answer follows.
        answer: what is to be said; one space is put in front of it.
        paraphrases: other prompts for the same answer, learned too.
        held_out: other prompts for the same answer, judged alone.
        others: prompts for something else about the subject, judged alone.
        neighbours: prompts about other subjects, judged alone.
        vector: what is known of the subject, as numbers; empty where it is not given.
        at: its place, ``file:line``.
    """

    subject: str
    prompt: str
    answer: str
    paraphrases: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    vector: tuple[float, ...] = ()
    at: str = ""

    @property
    def prompts(self) -> tuple[str, ...]:
        """All prompts that are learned, each once."""
        return tuple(dict.fromkeys((self.prompt, *self.paraphrases)))

    def taught(self) -> dict[str, Any]:
        """What a brick's card keeps of it."""
        return {
            "subject": self.subject,
            "prompt": self.prompt,
            "answer": self.answer,
            "paraphrases": list(self.paraphrases),
        }


def from_taught(entry: Mapping[str, Any]) -> Fact:
    """A fact from what a card keeps of it."""
    return Fact(**{**entry, "paraphrases": tuple(entry["paraphrases"])})


def normalised(text: str) -> str:
    """A text as subjects are looked for: one Unicode form, case folded, one space between words."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def mentions(text: str, subject: str) -> re.Match[str] | None:
    """Where a subject stands as whole words in a text, both as `normalised` gives them."""
    return re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", text)


def read_facts(path: str, *, key: str = "data.facts", limit: int | None = None) -> list[Fact]:
    """Reads and checks a file of facts.

    Args:
        path: JSONL, or another format that `data.files` reads and that can hold lists.
        key: the key that named it, for the error sentence.
        limit: at most so many facts, the first ones.

    Raises:
        UserError: a row is wrong, two ask the same, or what is held out is taught; with file and
            line.
    """
    facts: list[Fact] = []
    asked: dict[str, tuple[str, str]] = {}
    for raw in read_file(Path(path).expanduser(), key=key):
        fact = _fact(raw)
        for prompt in fact.prompts:
            told, at = asked.get(normalised(prompt), ("", ""))
            if not at:
                asked[normalised(prompt)] = fact.answer, fact.at
                continue
            what = (
                f"{at} teaches it already: remove one"
                if normalised(told) == normalised(fact.answer)
                else f"{at} teaches another answer to it, '{told}': keep one"
            )
            raise UserError(f"{fact.at}: the prompt '{prompt}' stands twice; {what}.")
        facts.append(fact)
    if not facts:
        raise UserError(f"{key}: {path} holds no facts.")
    for fact in facts:
        for prompt in fact.held_out:
            _, at = asked.get(normalised(prompt), ("", ""))
            if at:
                raise UserError(
                    f"{fact.at}: the prompt '{prompt}' is held out, and {at} teaches it: take it "
                    "out of one of them."
                )
    width = len(facts[0].vector)
    for fact in facts:
        if len(fact.vector) != width:
            raise UserError(
                f"{fact.at}: the vector has {len(fact.vector)} numbers, but that of {facts[0].at} "
                f"has {width}: give every fact one of the same length, or none."
            )
    return facts[:limit]


def fingerprint(facts: Sequence[Fact]) -> str:
    """SHA-256 of what facts say, wherever they stood."""
    rows = [
        {k: v for k, v in asdict(fact).items() if k != "at" and (v or k != "vector")}
        for fact in facts
    ]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _fact(raw: Raw) -> Fact:
    """One row as a fact."""
    if raw.values is None:
        raise UserError(f"{raw.at}: {raw.problem}.")
    row = dict(raw.values)
    for column in row:
        if column not in COLUMNS:
            raise UserError(f"{raw.at}: there is no column '{column}'.{nearest(column, COLUMNS)}")
    texts: dict[str, Any] = {
        name: _text(row.get(name), name, raw.at) for name in ("subject", "prompt", "answer")
    }
    lists: dict[str, Any] = {name: _texts(row.get(name), name, raw.at) for name in LISTS}
    neighbours = _neighbours(row.get("neighbours"), raw.at)
    vector = _vector(row.get("vector"), raw.at)
    fact = Fact(**texts, **lists, neighbours=neighbours, vector=vector, at=raw.at)
    subject = normalised(fact.subject)
    for prompt in (*fact.prompts, *fact.held_out, *fact.others):
        if mentions(normalised(prompt), subject) is None:
            raise UserError(
                f"{raw.at}: the prompt '{prompt}' does not name the subject '{fact.subject}', by "
                "which the brick knows that it is asked: write it into the prompt."
            )
    return fact


def _text(value: Any, name: str, at: str) -> str:
    if not isinstance(value, str) or not value.strip():
        found = "is missing" if value is None else "must be a text that is not empty"
        raise UserError(f"{at}: '{name}' {found}; a fact has subject, prompt and answer.")
    return value.strip()


def _texts(value: Any, name: str, at: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise UserError(f'{at}: \'{name}\' must be a list of prompts, ["…", "…"].')
    return tuple(dict.fromkeys(_text(one, name, at) for one in value))


def _vector(value: Any, at: str) -> tuple[float, ...]:
    if value is None:
        return ()
    numbers = isinstance(value, list) and all(type(one) in (int, float) for one in value)
    if not numbers or not all(map(math.isfinite, value)) or not any(value):
        raise UserError(f"{at}: 'vector' must be a list of finite numbers, not all of them 0.")
    return tuple(map(float, value))


def _neighbours(value: Any, at: str) -> tuple[str, ...]:
    """Prompts of neighbours; their answers are for people (what counts is that nothing changes)."""
    if value is None:
        return ()
    good = isinstance(value, list) and all(
        isinstance(one, Mapping) and set(one) <= {"prompt", "answer"} for one in value
    )
    if not good:
        raise UserError(f"{at}: 'neighbours' must be a list of {{prompt, answer}}.")
    return tuple(_text(one.get("prompt"), "neighbours.prompt", at) for one in value)
