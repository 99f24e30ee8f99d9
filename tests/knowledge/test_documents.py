"""Documents read: passages, questions by rule, splits, retrieval, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cfm_train.data.splits import content_hash
from cfm_train.errors import UserError
from cfm_train.knowledge.cloze import cloze, sentences
from cfm_train.knowledge.documents import Question, read
from cfm_train.knowledge.retrieval import Index, words
from tests.knowledge.handbooks import documents, section, text

PROSE = (
    "The council met in room 412 on the first Monday. Its chair was Ms. Ada Lovelace at the time. "
    "Nobody came.\n\nMembers of the council vote by a show of hands and never in secret."
)


def test_sentences_end_at_full_stops_and_blank_lines() -> None:
    found = [PROSE[span.start : span.end] for span in sentences(PROSE)]
    assert found == [
        "The council met in room 412 on the first Monday.",
        "Its chair was Ms. Ada Lovelace at the time.",
        "Nobody came.",
        "Members of the council vote by a show of hands and never in secret.",
    ]
    assert [span.opens for span in sentences(PROSE)] == [True, False, False, True]


@pytest.mark.parametrize(
    ("sentence", "prompt", "answer", "form"),
    [
        ("The council met in room 412 on the first Monday.", "The council met in room", "412",
         "number"),
        ("Its chair was then Ada Lovelace at the time.", "Its chair was then", "Ada Lovelace",
         "name"),
        ("Members of the council vote by a show of hands.", "Members of the council vote by a show",
         "of hands", "words"),
        ("It costs about 1,250.50 dollars, or 99 for members.",
         "It costs about 1,250.50 dollars, or", "99", "number"),
    ],
)  # fmt: skip
def test_a_sentence_gives_the_question_that_the_rule_names(
    sentence: str, prompt: str, answer: str, form: str
) -> None:
    made = cloze(sentence)
    assert made is not None and (made.prompt, made.answer, made.form) == (prompt, answer, form)
    assert sentence.startswith(f"{made.prompt} {made.answer}")


@pytest.mark.parametrize("sentence", ["Nobody came.", "Room 5 is not room 5 but room 5", ""])
def test_a_sentence_that_asks_nothing_gives_no_question(sentence: str) -> None:
    made = cloze(sentence)
    assert made is None or made.form == "words"


def test_a_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# Heading\n\n" + text(8, 1))
    (tmp_path / "a.txt").write_text(text(8, 2))
    (tmp_path / "c.jsonl").write_text(json.dumps({"body": text(8, 3)}) + "\n")
    (tmp_path / "d.csv").write_text("no document\n")
    found = read(section(tmp_path, text="body"))
    assert [Path(row["_at"].rsplit(":", 1)[0]).name for row in found.rows] == [
        "a.txt", "b.md", "c.jsonl",
    ]  # fmt: skip
    assert all(row["text"][0].strip() for row in found.rows)


def test_passages_are_whole_sentences_of_the_document(tmp_path: Path) -> None:
    found = documents(tmp_path, passage=20)
    whole = found.rows[0]["text"][0]
    assert all(p.text in whole and len(p.text.split()) <= 20 for p in found.passages)
    said = [p.text[a:b] for p in found.passages for a, b in p.sentences]
    assert said == [whole[span.start : span.end] for span in sentences(whole)]


def test_splits_share_no_question_and_stay_when_text_is_added(tmp_path: Path) -> None:
    few, many = documents(tmp_path, paragraphs=20), documents(tmp_path, paragraphs=40)
    side: dict[bytes, str] = {}
    for split, questions in many.questions.items():
        for question in questions:
            side[content_hash({"text": [question.prompt, question.answer]})] = split
    assert len(side) == sum(len(some) for some in many.questions.values())
    for split, questions in few.questions.items():
        for question in questions:
            assert side[content_hash({"text": [question.prompt, question.answer]})] == split
    again = documents(tmp_path, paragraphs=20)
    assert again.fingerprints == few.fingerprints != many.fingerprints


def test_every_question_knows_its_passage(tmp_path: Path) -> None:
    found = documents(tmp_path)
    for question in (q for some in found.questions.values() for q in some):
        place = found.passages[question.passage].text[question.place :]
        assert place.startswith(f"{question.prompt} {question.answer}")


def test_a_persons_questions_get_the_passage_that_fits(tmp_path: Path) -> None:
    made = documents(tmp_path, passage=9)
    asked = [q for some in made.questions.values() for q in some]
    file = tmp_path / "questions.jsonl"
    lines = [json.dumps({"prompt": q.prompt, "answer": q.answer}) for q in asked]
    file.write_text("\n".join(lines) + "\n")
    given = documents(tmp_path, passage=9, questions=str(file))
    assert given.given and not made.given

    def places(some: list[Question]) -> dict[str, int]:
        return {q.prompt: q.passage for q in some}

    for split, questions in made.questions.items():
        assert places(given.questions[split]) == places(questions)


def test_retrieval_is_bm25() -> None:
    texts = ["the cat sat on the mat", "a dog sat", "cats and dogs and cats"]
    index, query = Index(texts), "the dog sat sat"
    lengths = [len(words(t)) for t in texts]
    for number, passage in enumerate(texts):
        score = 0.0
        for word in {"the", "dog", "sat"}:
            f, there = words(passage).count(word), sum(word in words(t) for t in texts)
            norm = 1.5 * (1 - 0.75 + 0.75 * lengths[number] / (sum(lengths) / 3))
            score += math.log(1 + (3 - there + 0.5) / (there + 0.5)) * f * 2.5 / (f + norm)
        assert index.scores(query).get(number, 0.0) == pytest.approx(score)
    assert index.best("dogs") == 2
    assert index.best("nothing of it") == 0


@pytest.mark.parametrize(
    ("content", "changed", "sentence"),
    [
        ("w5 w6 w7", {}, "gives 0 different questions"),
        ("", {}, "holds no text|is empty"),
        (text(), {"questions": "missing.jsonl"}, "data.questions: missing.jsonl: there is no such"),
        (text(), {"unrelated": "handbook.txt", "unrelated_unit": "file"}, "holds one text alone"),
        (text(), {"documents": "nowhere"}, "data.documents: nowhere: there is no such file"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_sentence(
    content: str,
    changed: dict[str, Any],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("handbook.txt").write_text(content)
    with pytest.raises(UserError, match=sentence):
        read(section(Path("handbook.txt")) | changed)


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "handbook.txt").write_text(text())
    given = section(tmp_path / "handbook.txt")
    script = (
        "import sys; from cfm_train.knowledge.documents import read; "
        f"read({given!r}); assert not {{'torch', 'transformers'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
