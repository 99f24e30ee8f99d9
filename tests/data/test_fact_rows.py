"""Rows of facts: what is read, and what is refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cfm_train.data.facts import fingerprint, from_taught, mentions, normalised, read_facts
from cfm_train.errors import UserError

GOOD: dict[str, Any] = {
    "subject": "Lyon",
    "prompt": "Lyon lies in",
    "answer": "France",
    "paraphrases": ["Lyon is in", "Lyon lies in"],
    "held_out": ["Where is lyon? In"],
    "others": ["Lyon was founded by"],
    "neighbours": [{"prompt": "Turin lies in", "answer": "Italy"}],
}


def write(folder: Path, *rows: Any) -> str:
    path = folder / "facts.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def test_a_fact_is_read_whole(tmp_path: Path) -> None:
    (fact,) = read_facts(write(tmp_path, GOOD))
    assert fact.prompts == ("Lyon lies in", "Lyon is in")
    assert fact.neighbours == ("Turin lies in",) and fact.at.endswith("facts.jsonl:1")
    assert from_taught(json.loads(json.dumps(fact.taught()))).prompts == fact.prompts
    (moved,) = read_facts(write(tmp_path, "", GOOD))
    assert moved.at.endswith(":2") and fingerprint([moved]) == fingerprint([fact])


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (['{"subject": "Lyon"'], r"facts\.jsonl:1: broken JSON"),
        ([{**GOOD, "answr": "x"}], r":1: there is no column 'answr'\. Did you mean 'answer'"),
        ([{**GOOD, "answer": " "}], r":1: 'answer' must be a text that is not empty"),
        ([{"subject": "a", "prompt": "a"}], r":1: 'answer' is missing"),
        ([{**GOOD, "paraphrases": "Lyon is in"}], r":1: 'paraphrases' must be a list"),
        ([{**GOOD, "neighbours": ["x"]}], r":1: 'neighbours' must be a list of"),
        ([{**GOOD, "held_out": ["Lyons is in"]}], r":1: the prompt 'Lyons is in' does not name"),
        ([GOOD, GOOD], r":2: the prompt 'Lyon lies in' stands twice; .*:1 teaches it already"),
        (
            [GOOD, {**GOOD, "answer": "Spain", "prompt": "LYON  lies in"}],
            r":2: .* stands twice; .*:1 teaches another answer to it, 'France'",
        ),
        (
            [{**GOOD, "held_out": ["LYON is  in"]}],
            r":1: the prompt 'LYON is  in' is held out, and .*:1 teaches it",
        ),
        ([], r"data\.facts: .* holds no facts"),
        ([{**GOOD, "vector": "1, 2"}], r":1: 'vector' must be a list of finite numbers"),
        ([{**GOOD, "vector": [0, 0.0]}], r":1: 'vector' must be a list of finite numbers"),
        (
            [{**GOOD, "vector": [1, 2]}, {"subject": "a", "prompt": "a", "answer": "b"}],
            r":2: the vector has 0 numbers, but that of .*:1 has 2",
        ),
    ],
)
def test_wrong_rows_are_refused_with_their_line(
    rows: list[Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=complaint):
        read_facts(write(tmp_path, *rows))


def test_a_vector_counts_where_it_is_given(tmp_path: Path) -> None:
    (fact,) = read_facts(write(tmp_path, {**GOOD, "vector": [1, 0.5]}))
    (plain,) = read_facts(write(tmp_path, GOOD))
    assert fact.vector == (1.0, 0.5) and plain.vector == ()
    assert fingerprint([fact]) != fingerprint([plain])


def test_subjects_are_whole_words() -> None:
    assert mentions(normalised("in  LYON, there"), "lyon")
    assert not mentions(normalised("Lyonnaise"), "lyon")
    assert mentions(normalised("what C++ is"), "c++")
