"""The arms by hand on a tiny Llama: teacher-forced, written freely, paired; the cost elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cfm_train.bricks.cartridge import Cartridge
from cfm_train.bricks.document import Document
from cfm_train.evaluation.intervals import paired_interval
from cfm_train.knowledge.arms import Answered, all_arms, begins, scores
from cfm_train.knowledge.tokens import Reader, shown
from cfm_train.knowledge.unrelated import cost
from tests.backbones import plain_model, tiny
from tests.knowledge.handbooks import documents


def by_hand(ids: list[int], start: int, front: list[int]) -> tuple[float, int, list[int]]:
    """Nats and right tokens of an answer behind a text, and what is written in its place."""
    plain = plain_model("llama")
    with torch.no_grad():
        p = torch.log_softmax(plain(torch.tensor([front + ids])).logits[0].double(), -1)
        begin = len(front) + start
        nats = -sum(float(p[begin + i - 1, token]) for i, token in enumerate(ids[start:]))
        right = sum(int(p[begin + i - 1].argmax()) == t for i, t in enumerate(ids[start:]))
        said = front + ids[:start]
        for _ in range(len(ids) - start):
            said.append(int(plain(torch.tensor([said])).logits[0, -1].argmax()))
    return nats, right, said[begin:]


def test_all_four_arms_are_what_a_plain_model_says(tmp_path: Path) -> None:
    """A new cartridge is its text before the question, so every arm can be written as text."""
    backbone = tiny("llama")
    found = documents(tmp_path, paragraphs=16, passage=20)
    reader = Reader(found, backbone.tokenizer, max_length=32, context=32)
    held = reader.whole(6)
    brick = Cartridge(6, "document", None, 1, ["attn"], None, "shared")
    brick = brick.about(torch.tensor(held)).build(backbone)
    answered = all_arms(backbone, reader, [brick], generate=True)
    for number, question in enumerate(found.questions["test"]):
        item = reader.question(question)
        context = backbone.tokenizer(found.passages[question.passage].text)["input_ids"]
        for arm, front in {
            "bare": [],
            "text": context,
            "brick": held,
            "both": held + context,
        }.items():
            nats, right, said = by_hand(item.ids, item.start, front)
            one = answered[arm]
            assert one.nats[number] == pytest.approx(nats, rel=1e-4)
            assert (one.right[number], one.tokens[number]) == (right, len(item.ids) - item.start)
            text = backbone.tokenizer.decode(said, skip_special_tokens=True)
            assert one.exact is not None
            assert one.exact[number] == (text == question.answer)
            assert one.texts[number].strip().startswith(text)
            assert one.exact[number] == 1 or right < one.tokens[number]
    assert not backbone.slots.plan


def test_a_document_brick_is_its_text_in_the_prompt(tmp_path: Path) -> None:
    """Encoded once or read each time: the same answers."""
    backbone = tiny("llama")
    found = documents(tmp_path, paragraphs=8, passage=200)
    reader = Reader(found, backbone.tokenizer, max_length=32, context=100)
    brick = (
        Document(None, ["attn"], None, "shared").about(torch.tensor(reader.whole())).build(backbone)
    )
    answered = all_arms(backbone, reader, [brick], generate=False)
    assert reader.cut == 0
    np.testing.assert_allclose(answered["brick"].nats, answered["text"].nats, rtol=1e-4)


def test_a_long_passage_is_cut_around_its_question(tmp_path: Path) -> None:
    backbone = tiny("llama")
    found = documents(tmp_path, passage=200)
    reader = Reader(found, backbone.tokenizer, max_length=32, context=16)
    for question in found.questions["test"]:
        item = reader.question(question, context=True)
        asked = backbone.tokenizer(question.prompt)["input_ids"]
        assert len(item.context) == 16
        assert asked[0] in item.context
        whole = shown(item, 0)
        assert whole.ids == item.context + item.ids
        assert whole.ids[whole.start :] == item.ids[item.start :]
    assert reader.cut == len(found.questions["test"])
    reader.gap = [4, 5]  # a line break takes its room from the passage
    broken = reader.question(found.questions["test"][0], context=True).context
    assert len(broken) == 16 and broken[-2:] == [4, 5]


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (" 412 on Monday", "412", True),
        ("4125", "412", False),
        ("the  council\n", "the council", True),
        ("council", "the council", False),
    ],
)
def test_an_answer_is_right_where_the_text_begins_with_it(
    text: str, answer: str, right: bool
) -> None:
    assert begins(text, answer) is right


def test_gains_are_paired() -> None:
    """With as many tokens in every answer the gain is the mean of the differences."""
    draw = np.random.default_rng(0)
    tokens = np.full(50, 3, np.int64)
    arms = {
        name: Answered(draw.random(50), tokens, draw.integers(0, 4, 50), draw.random(50), [])
        for name in ("bare", "text", "brick", "both")
    }
    found = scores(arms, bootstrap=4000, seed=1)
    a, b = arms["brick"].nats / 3, arms["bare"].nats / 3
    expected = paired_interval(a, b, bootstrap=4000, seed=2)
    gain = found["brick over bare/loss"]
    assert gain.value == pytest.approx(expected.value)
    assert (gain.low, gain.high) == pytest.approx((expected.low, expected.high), abs=0.01)
    assert found["text/token_accuracy"].value == pytest.approx(arms["text"].right.sum() / 150)
    assert found["both over text/exact_match"].n == 50


def test_the_cost_elsewhere_is_a_ratio_of_perplexities(tmp_path: Path) -> None:
    backbone, plain = tiny("llama"), plain_model("llama")
    reader = Reader(documents(tmp_path), backbone.tokenizer, max_length=16, context=16)
    rows = reader.blocks(documents(tmp_path, seed=5).rows, [])
    held = torch.arange(3, 9)
    brick = Document(None, ["attn"], None, "shared").about(held).build(backbone)
    found = cost(backbone, [brick], rows, bootstrap=50, seed=0)
    nats, tokens = {"bare": 0.0, "brick": 0.0}, 0
    for row in range(len(rows)):
        ids = rows.slice("input_ids", row)
        labels = rows.slice("token_labels", row)
        starts = [i for i in range(len(ids)) if labels[i] == -100]
        for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            piece = ids[begin:end].tolist()
            tokens += len(piece) - 1
            for name, front in (("bare", []), ("brick", held.tolist())):
                with torch.no_grad():
                    logits = plain(torch.tensor([front + piece])).logits[0].double()
                p = torch.log_softmax(logits, -1)[len(front) :]
                nats[name] -= sum(float(p[i - 1, piece[i]]) for i in range(1, len(piece)))
    assert found["bare/perplexity"].value == pytest.approx(np.exp(nats["bare"] / tokens), rel=1e-4)
    ratio = np.exp((nats["brick"] - nats["bare"]) / tokens)
    assert found["perplexity_ratio"].value == pytest.approx(ratio, rel=1e-4)
    assert cost(backbone, [], rows, bootstrap=5, seed=0)["perplexity_ratio"].value == 1.0
