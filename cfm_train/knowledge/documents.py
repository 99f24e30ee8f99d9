"""A person's documents, read and checked before torch is imported.

    data.documents  ─► rows       whole documents, for language modelling
                    ─► passages   stretches of whole sentences, what is shown in a context
                    ─► questions  each knows its passage; train, validation and test share none
    data.unrelated  ─► rows       text that a brick shall leave as it is

Questions are a person's (``data.questions``: JSONL with ``prompt`` and ``answer``) or made by rule
(`cloze`). Which of them train, validate and test is decided by the hash of what they say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.data.files import Raw, read_file
from cfm_train.data.labels import BadRow
from cfm_train.data.places import local
from cfm_train.data.rows import MissingColumn, Row, parse
from cfm_train.data.sources import fingerprint
from cfm_train.data.splits import content_hash, cut, take
from cfm_train.errors import UserError, nearest
from cfm_train.knowledge.cloze import Span, cloze, sentences
from cfm_train.knowledge.retrieval import Index

#: What a folder of documents is read for; other files in it are no documents.
ENDINGS = (".txt", ".md", ".jsonl")
#: Endings of files that are a text as a whole, and so have no columns.
_TEXTS = (".txt", ".md", ".txt.gz", ".md.gz")


@dataclass(frozen=True)
class Passage:
    """A stretch of a document.

    Attributes:
        text: as it stands in the document.
        at: where the document stands, as ``file:line``.
        sentences: where each sentence begins and ends in ``text``.
    """

    text: str
    at: str
    sentences: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Question:
    """Something that the documents answer.

    Attributes:
        prompt: what is asked: the beginning of a text that goes on with a blank and the answer.
        answer: what is right.
        passage: number of the passage that holds the answer.
        place: the character of that passage around which it is.
        at: where the question stands, or the document that it was made from.
        form: ``given``, or which rule made it.
    """

    prompt: str
    answer: str
    passage: int
    place: int
    at: str
    form: str


@dataclass(frozen=True)
class Documents:
    """Documents that have been read.

    Attributes:
        rows: the documents, whole.
        passages: all of them cut into passages.
        questions: ``train``, ``validation`` and ``test``.
        given: whether a person asked the questions.
        unrelated: ``train`` and ``test`` rows of other text; both empty where none was given.
        fingerprints: content hashes for the config hash.
    """

    rows: list[Row]
    passages: list[Passage]
    questions: dict[str, list[Question]]
    given: bool
    unrelated: dict[str, list[Row]]
    fingerprints: dict[str, str]

    def line(self) -> str:
        """One line on what was read, for the person who waits."""
        asked = ", ".join(f"{len(some):,} {split}" for split, some in self.questions.items())
        made = "given" if self.given else "made by rule"
        parts = [
            f"{len(self.rows):,} documents in {len(self.passages):,} passages",
            f"questions ({made}): {asked}",
        ]
        if self.unrelated["test"]:
            count = {split: len(rows) for split, rows in self.unrelated.items()}
            parts.append(f"unrelated: {count['train']:,} train, {count['test']:,} test rows")
        return "; ".join(parts)


def read(section: Mapping[str, Any]) -> Documents:
    """Reads the documents, questions and unrelated text of a section `config.sections.Documents`.

    Raises:
        UserError: a file is missing, empty or broken, or no question can be asked.
    """
    rows = list(whole("documents", section))
    passages = [passage for row in rows for passage in cut_up(row, section["passage"])]
    if section["questions"] is None:
        asked = list(_made(passages))
    else:
        asked = list(_given(section["questions"], passages))
    questions = _split(asked, section)
    unrelated: dict[str, list[Row]] = {"train": [], "test": []}
    if section["unrelated"] is not None:
        others = list(whole("unrelated", section))
        unrelated["train"], unrelated["test"] = cut(others, section["unrelated_fraction"], draw=1)
        if not unrelated["train"] or not unrelated["test"]:
            raise UserError(
                f"data.unrelated: {section['unrelated']} holds one text alone, and some of it is "
                "trained on while the rest is judged: give more rows, or a smaller data.unit."
            )
    prints = {"data/documents": fingerprint(rows)}
    prints |= {
        f"data/questions/{split}": fingerprint(_as_rows(q)) for split, q in questions.items()
    }
    prints |= {f"data/unrelated/{split}": fingerprint(r) for split, r in unrelated.items() if r}
    return Documents(rows, passages, questions, section["questions"] is not None, unrelated, prints)


def whole(key: str, section: Mapping[str, Any]) -> Iterator[Row]:
    """The documents of a file or of every file in a folder, in order of the names.

    Args:
        key: ``documents`` or ``unrelated``.
        section: of the run's data: the place under ``key``, ``text`` and the unit of text files.

    Raises:
        UserError: a file is missing, empty or broken.
    """
    found = False
    for path in _files(local(section[key]), f"data.{key}"):
        column = "text" if path.name.lower().endswith(_TEXTS) else section["text"]
        # A document of its own is a whole file; unrelated text is cut finer, to be drawn from.
        unit = section["unit"] if key == "documents" else section["unrelated_unit"]
        for raw in read_file(path, key=f"data.{key}", unit=unit):
            yield _parsed(raw, {"task": "causal", "text": column})
            found = True
    if not found:
        raise UserError(f"data.{key}: {section[key]} holds no text.")


def _parsed(raw: Raw, section: Mapping[str, Any]) -> Row:
    try:
        return parse(raw, section)
    except MissingColumn as problem:
        hint = nearest(problem.column, problem.available)
        raise UserError(f"data.text: {raw.at}: {problem}.{hint}") from None
    except BadRow as problem:
        raise UserError(f"{raw.at}: {problem}. Correct it, or take it out.") from None


def _files(place: Path, key: str) -> list[Path]:
    if not place.is_dir():
        return [place]
    found = sorted(path for path in place.iterdir() if path.name.lower().endswith(ENDINGS))
    if not found:
        raise UserError(f"{key}: the folder {place} holds no {', '.join(ENDINGS)} file.")
    return found


def cut_up(row: Row, words: int) -> Iterator[Passage]:
    """A document as passages: whole sentences, a new passage where the next would be too many.

    Args:
        row: the document.
        words: most words of a passage; a longer sentence is one of its own.
    """
    text = row["text"][0]
    held: list[Span] = []
    count = 0
    for span in sentences(text):
        size = len(text[span.start : span.end].split())
        if held and count + size > words:
            yield _passage(row, text, held)
            held, count = [], 0
        held.append(span)
        count += size
    if held:
        yield _passage(row, text, held)


def _passage(row: Row, text: str, held: Sequence[Span]) -> Passage:
    start = held[0].start
    places = tuple((span.start - start, span.end - start) for span in held)
    return Passage(text[start : held[-1].end], row["_at"], places)


def _made(passages: Sequence[Passage]) -> Iterator[Question]:
    """The questions that the rule makes, one from a sentence at most."""
    for number, passage in enumerate(passages):
        for start, end in passage.sentences:
            made = cloze(passage.text[start:end])
            if made is not None:
                yield Question(made.prompt, made.answer, number, start, passage.at, made.form)


def _given(path: str, passages: Sequence[Passage]) -> Iterator[Question]:
    """A person's questions; the passage is the one that fits the words best."""
    index = Index([passage.text for passage in passages])
    section = {"task": "causal", "text": ["prompt", "answer"]}
    for raw in read_file(local(path), key="data.questions"):
        try:
            prompt, answer = (part.strip() for part in parse(raw, section)["text"])
        except MissingColumn as problem:
            raise UserError(
                f"data.questions: {raw.at}: {problem}; each row needs a prompt and an answer."
            ) from None
        except BadRow as problem:
            raise UserError(f"data.questions: {raw.at}: {problem}.") from None
        number = index.best(f"{prompt} {answer}")
        place = max(0, passages[number].text.find(answer))
        yield Question(prompt, answer, number, place, raw.at, "given")


def _split(asked: Sequence[Question], section: Mapping[str, Any]) -> dict[str, list[Question]]:
    """Questions by split; what is asked twice counts once.

    Raises:
        UserError: there are too few of them.
    """
    rows: dict[bytes, Row] = {}
    for question in asked:
        (row,) = _as_rows([question])
        rows.setdefault(content_hash(row), row | {"_question": question})
    chosen = take(list(rows.values()), section["most_questions"])
    rest, test = cut(chosen, section["test_fraction"], draw=1)
    train, validation = cut(rest, section["validation_fraction"], draw=0)
    split = {"train": train, "validation": validation, "test": test}
    if not test or not train:
        source = section["questions"] or section["documents"]
        raise UserError(
            f"data: {source} gives {len(chosen)} different questions, and some are trained on "
            "while others are judged: give longer documents, or data.questions=FILE."
        )
    return {name: [row["_question"] for row in some] for name, some in split.items()}


def _as_rows(questions: Sequence[Question]) -> list[Row]:
    return [{"text": [q.prompt, q.answer], "_at": q.at} for q in questions]
