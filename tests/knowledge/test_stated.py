"""Facts made of documents: what each sentence states, about whom, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cfm_train.data.facts import mentions, normalised
from cfm_train.errors import UserError
from cfm_train.knowledge.stated import LONGEST, facts_of

TEXT = """The council of Lyon shall meet in room 412. The mayor of Lyon and Villeurbanne was \
elected in 2014. It was the largest aqueduct within the realm.

The council of Lyon shall meet in room 413. Nothing here. Members of WHO and Lyon came with Smith.
"""


def section(**given: Any) -> dict[str, Any]:
    return {"facts": None, "documents": None, "text": "text", "limit": None, **given}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    found = tmp_path / "text.md"
    found.write_text(TEXT)
    return found


def test_a_sentence_states_a_fact_about_its_rarest_name(place: Path) -> None:
    found = facts_of(section(documents=str(place)))
    assert [(fact.subject, fact.prompt, fact.answer) for fact in found] == [
        ("Lyon", "The council of Lyon shall meet in room", "412"),
        ("Villeurbanne", "The mayor of Lyon and Villeurbanne was elected in", "2014"),
        ("aqueduct", "It was the largest aqueduct within", "the realm"),
        ("WHO", "Members of WHO and Lyon came with", "Smith"),
    ]
    for fact in found:
        assert mentions(normalised(fact.prompt), normalised(fact.subject))
    assert facts_of(section(documents=str(place), limit=2)) == found[:2]


def test_a_prompt_is_no_longer_than_a_gate_can_read(tmp_path: Path) -> None:
    for words, count in ((LONGEST, 1), (LONGEST + 1, 0)):
        file = tmp_path / "long.txt"
        file.write_text("word " * words + "412. The mayor of Lyon was elected in 2014.")
        assert len(facts_of(section(documents=str(file)))) == count + 1


def test_documents_of_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"body": "The mayor of Lyon was elected in 2014."}\n')
    (fact,) = facts_of(section(documents=str(file), text="body"))
    assert (fact.subject, fact.answer, fact.at) == ("Lyon", "2014", f"{file}:1")


def test_what_cannot_be_taught_is_refused(place: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Nothing here.")
    for wrong, complaint in (
        ({}, r"^data: facts come from .* or data\.documents=FILE_OR_FOLDER: give one of them\.$"),
        ({"facts": "a.jsonl", "documents": str(place)}, r"and data\.documents.*give one of them"),
        ({"documents": str(short)}, "no sentence of .* states a fact"),
        ({"documents": str(tmp_path / "none.txt")}, "none.txt"),
    ):
        with pytest.raises(UserError, match=complaint):
            facts_of(section(**wrong))
