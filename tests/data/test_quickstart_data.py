"""The shipped quickstart data are what their README says: sizes, balance, labels, no repeats."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files
from itertools import combinations

import pytest

FOLDER = files("cfm_train.data") / "quickstart"

# task: (labels, train rows per label, test rows per label, shortest and longest row in words)
TASKS = {
    "tone": (("negative", "neutral", "positive"), 100, 30, (5, 18)),
    "request": (("account", "delivery", "other", "refund", "technical"), 48, 18, (5, 20)),
    "tense": (("future", "past", "present"), 80, 30, (4, 13)),
    "claim": (("fact", "instruction", "opinion", "question"), 60, 22, (4, 17)),
}


def read(task: str, split: str) -> list[dict[str, str]]:
    """The rows of one file, without the reader under test elsewhere."""
    content = (FOLDER / f"{task}.{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in content.splitlines()]


def words(text: str) -> frozenset[str]:
    """The set of lower-case words of a text."""
    return frozenset(re.findall(r"[\w']+", text.lower()))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Shared words over all words, |A ∩ B| / |A ∪ B|."""
    return len(first & second) / len(first | second)


def test_the_folder_holds_two_files_per_task_and_a_readme() -> None:
    expected = {f"{task}.{split}.jsonl" for task in TASKS for split in ("train", "test")}
    assert {entry.name for entry in FOLDER.iterdir()} == expected | {"README.md"}


@pytest.mark.parametrize("task", TASKS)
def test_every_label_has_its_number_of_rows_in_both_splits(task: str) -> None:
    labels, train, test, _ = TASKS[task]
    assert Counter(row["label"] for row in read(task, "train")) == dict.fromkeys(labels, train)
    assert Counter(row["label"] for row in read(task, "test")) == dict.fromkeys(labels, test)


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_clean_sentences_of_the_stated_length(task: str) -> None:
    rows = read(task, "train") + read(task, "test")
    for row in rows:
        assert set(row) == {"text", "label"}
        assert row["text"] == " ".join(row["text"].split()), row
        assert row["text"][0].isupper() or row["text"][0].isdigit(), row
    lengths = [len(row["text"].split()) for row in rows]
    assert (min(lengths), max(lengths)) == TASKS[task][3]


def test_no_text_occurs_twice_in_any_file_or_task() -> None:
    texts = [
        row["text"].lower()
        for task in TASKS
        for split in ("train", "test")
        for row in read(task, split)
    ]
    assert [text for text, count in Counter(texts).items() if count > 1] == []


@pytest.mark.parametrize("task", TASKS)
def test_no_two_rows_are_near_duplicates(task: str) -> None:
    """Over both splits at once, so that no test row is a train row with a word or two swapped."""
    bags = [
        (words(row["text"]), row["text"])
        for split in ("train", "test")
        for row in read(task, split)
    ]
    near = [
        (a, b) for (first, a), (second, b) in combinations(bags, 2) if jaccard(first, second) > 0.5
    ]
    assert near == []


def test_claim_rows_end_without_punctuation() -> None:
    """Otherwise the last character alone would tell a question from the rest."""
    for row in read("claim", "train") + read("claim", "test"):
        assert row["text"][-1].isalnum(), row


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_a_label_do_not_stand_together(task: str) -> None:
    """The files are shuffled: even a run limited to 30 rows sees every label."""
    labels = TASKS[task][0]
    for split in ("train", "test"):
        assert {row["label"] for row in read(task, split)[:30]} == set(labels)
