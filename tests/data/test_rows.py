"""Rows of every task type: what is taken, and what is refused with which words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfm_train.data.files import Raw
from cfm_train.data.labels import BadRow
from cfm_train.data.rows import parse
from cfm_train.data.sources import check
from cfm_train.errors import UserError

Make = Callable[..., dict[str, Any]]
Write = Callable[..., str]


def row(section: dict[str, Any], values: dict[str, Any], typed: bool = True, **kw: bool) -> Any:
    parsed = parse(Raw("f:1", values, typed=typed), section, **kw)
    assert parsed.pop("_at") == "f:1"
    return parsed


def test_pairs(section: Make) -> None:
    pair = section(text=["a", "b"])
    assert row(pair, {"a": "x", "b": "y", "label": 1, "more": 2}) == {
        "text": ["x", "y"],
        "label": 1,
    }
    with pytest.raises(BadRow, match="column 'b' is empty"):
        row(pair, {"a": "x", "b": "", "label": 1})


@pytest.mark.parametrize(
    ("value", "typed", "labels"),
    [
        (["b", "a", "b"], True, ["b", "a"]),
        ([0, 2], True, [0, 2]),
        ([], True, []),
        ("a; b", False, ["a", "b"]),
        ('["a", "b"]', False, ["a", "b"]),
        ("0;2", False, [0, 2]),
        ("", False, []),
    ],
)
def test_multilabel_in_one_column(section: Make, value: Any, typed: bool, labels: Any) -> None:
    many = section(task="multilabel")
    assert row(many, {"text": "x", "label": value}, typed)["label"] == labels


def test_multilabel_in_a_column_each(section: Make, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,rude,loud\nx,1,0\ny,true,1.0\nz,0,False\n")
    keys = {"task": "multilabel", "label": ["rude", "loud"], "validation_fraction": 0.0}
    checked = check(section(train=str(tmp_path / "a.csv"), **keys))
    assert checked.spec.labels == ("rude", "loud")
    assert [r["label"] for r in checked.rows["train"]] == [[0], [0, 1], []]
    with pytest.raises(BadRow, match="column 'loud' must be 0 or 1, found 2"):
        row(section(**keys), {"text": "x", "rude": 1, "loud": 2})
    with pytest.raises(BadRow, match="must be a list"):
        row(section(task="multilabel"), {"text": "x", "label": "a"})


def test_multilabel_found_in_train(section: Make, write: Write) -> None:
    rows = [
        {"text": "x", "label": ["b"]},
        {"text": "y", "label": []},
        {"text": "z", "label": ["c", "a"]},
    ]
    checked = check(
        section(task="multilabel", train=write("a.jsonl", rows), validation_fraction=0.0)
    )
    assert checked.spec.labels == ("a", "b", "c")
    assert [r["label"] for r in checked.rows["train"]] == [[1], [], [2, 0]]


def test_regression(section: Make) -> None:
    score = section(task="regression")
    assert row(score, {"text": "x", "label": 3})["label"] == 3.0
    assert row(score, {"text": "x", "label": "-2.5e-1"}, typed=False)["label"] == -0.25
    for value in ("2.5", None, True, float("nan"), float("inf"), [1], "good", -3.5e38):
        with pytest.raises(BadRow, match="must be a number"):
            row(score, {"text": "x", "label": value})


def test_tokens_and_tags(section: Make) -> None:
    words = section(task="token", text="tokens", label="tags")
    parsed = row(words, {"tokens": ["New", "York", "!"], "tags": ["B-LOC", "I-LOC", "O"]})
    assert parsed["text"] == ["New York !"]
    assert [parsed["text"][0][a:b] for a, b in parsed["words"]] == parsed["tokens"]
    assert parsed["label"] == ["B-LOC", "I-LOC", "O"]
    assert "label" not in row(words, {"tokens": ["a"]}, answers=False)
    for tokens, tags, reason in (
        (["a", "b"], ["O"], "2 tokens need a list of as many tags, found 1"),
        (["a"], "O", "found text"),
        ([], [], "the list of tokens is empty"),
        (["a", " "], ["O", "O"], "every token must be text"),
        (["a", 3], ["O", "O"], "every token must be text"),
    ):
        with pytest.raises(BadRow, match=reason):
            row(words, {"tokens": tokens, "tags": tags})


def test_spans_of_characters_become_tags(section: Make) -> None:
    spans = section(task="token", label="spans")
    text = "Ada Lovelace met Babbage's engine in London."
    value = [{"start": 0, "end": 12, "label": "PER"}, [17, 24, "PER"], [37, 43, "LOC"]]
    parsed = row(spans, {"text": text, "spans": value})
    tagged = [(w, t) for w, t in zip(parsed["tokens"], parsed["label"], strict=True) if t != "O"]
    assert tagged == [
        ("Ada", "B-PER"),
        ("Lovelace", "I-PER"),
        ("Babbage", "B-PER"),
        ("London", "B-LOC"),
    ]
    assert [text[a:b] for a, b in parsed["words"]] == parsed["tokens"]
    # A span that begins inside a word takes the whole word.
    widened = row(spans, {"text": text, "spans": [[5, 10, "PER"]]})
    assert widened["label"][1] == "B-PER"
    for bad, reason in (
        ([[0, 99, "PER"]], "outside of the text's 44 characters"),
        ([[3, 3, "PER"]], "outside"),
        ([[0, 12, "PER"], [4, 8, "X"]], "lies over another span"),
        ([[3, 4, "PER"]], "holds no word"),
        ([[0, "3", "PER"]], "whole numbers"),
        ([{"start": 0, "end": 3}], "a span is"),
        ("PER", "spans must be a list"),
    ):
        with pytest.raises(BadRow, match=reason):
            row(spans, {"text": text, "spans": bad})


def test_an_entity_seen_in_single_words_only_can_grow(section: Make, write: Write) -> None:
    rows = [{"tokens": ["Rome", "fell"], "tags": ["B-LOC", "O"]}]
    test = [{"tokens": ["New", "York"], "tags": ["B-LOC", "I-LOC"]}]
    keys = {"task": "token", "text": "tokens", "label": "tags", "validation_fraction": 0.0}
    checked = check(section(train=write("a.jsonl", rows), test=write("b.jsonl", test), **keys))
    assert checked.spec.labels == ("B-LOC", "I-LOC", "O")
    assert checked.spec.metric == "entity_f1"
    plain = [{"tokens": ["Rome", "fell"], "tags": ["NOUN", "VERB"]}]
    checked = check(section(train=write("c.jsonl", plain), **keys))
    assert checked.spec.metric == "token_accuracy"
    with pytest.raises(UserError, match=r"entity_f1.*without BIO tags"):
        check(section(train=write("c.jsonl", plain), metric="entity_f1", **keys))


def test_questions_and_answers(section: Make) -> None:
    keys = {"task": "instruct", "label": None, "target": "output", "system": "persona"}
    alpaca = section(text=["instruction", "input"], **keys)
    values = {"instruction": "Add.", "input": "1 2", "output": "3", "persona": "Be brief."}
    assert row(alpaca, values)["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add.\n\n1 2"},
        {"role": "assistant", "content": "3"},
    ]
    bare = row(alpaca, {**values, "input": "", "persona": ""}, answers=False)
    assert bare["messages"] == [{"role": "user", "content": "Add."}]
    with pytest.raises(BadRow, match="column 'output' is empty"):
        row(alpaca, {**values, "output": " "})


USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
SYSTEM = {"role": "system", "content": "s"}


def test_conversations(section: Make) -> None:
    chat = section(task="instruct", label=None, text=None, messages="chat")
    assert row(chat, {"chat": [SYSTEM, USER, BOT, USER, BOT]})["messages"][-1] == BOT
    share = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    assert row(chat, {"chat": share})["messages"] == [USER, BOT]
    text = '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]'
    assert row(chat, {"chat": text}, typed=False)["messages"] == [USER, BOT]
    assert row(chat, {"chat": [USER]}, answers=False)["messages"] == [USER]
    for messages, reason in (
        ([USER], "the last message must be the assistant's"),
        ([USER, USER, BOT], "take turns"),
        ([BOT], "take turns"),
        ([USER, SYSTEM, BOT], "take turns"),
        ([SYSTEM], "last message"),
        (
            [USER, {"role": "tool", "content": "x"}],
            "role is system, user or assistant, found 'tool'",
        ),
        ([USER, {"role": "assistant", "content": ""}], "the assistant's message is empty"),
        (["hi"], "a message is"),
        ("hi", "must be a list"),
        ([], "must be a list"),
    ):
        with pytest.raises(BadRow, match=reason):
            row(chat, {"chat": messages})


def test_seq2seq_and_causal(section: Make) -> None:
    pairs = section(task="seq2seq", label=None, target="short", text=["title", "text"])
    values = {"title": "T", "text": "long", "short": "s"}
    assert row(pairs, values) == {"text": ["T\n\nlong"], "target": "s"}
    assert row(pairs, values, answers=False) == {"text": ["T\n\nlong"]}
    documents = section(task="causal", label=None)
    assert row(documents, {"text": "doc"}) == {"text": ["doc"]}
    assert row(documents, {"text": "doc"}, answers=False) == {"text": ["doc"], "prompt": True}


@pytest.mark.parametrize("key", ["target", "system", "messages"])
def test_a_column_that_the_task_has_no_use_for(section: Make, write: Write, key: str) -> None:
    path = write("a.jsonl", [{"text": "x", "label": "a"}])
    with pytest.raises(UserError, match=f"data.{key}: a classification task has no {key}"):
        check(section(train=path, **{key: "text"}))
