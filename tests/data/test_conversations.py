"""Answers are found in every template: the oracle is transformers' own mask of generated text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfm_train.data.conversations import answer_spans, write
from cfm_train.data.encode import encode_rows
from cfm_train.data.tasks import IGNORED, TaskSpec
from cfm_train.errors import UserError

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Once upon a time"},
    {"role": "assistant", "content": "there was a girl. user"},
    {"role": "user", "content": "and then?"},
    {"role": "assistant", "content": "She was happy."},
]

# Each template with the blocks that transformers masks as generated: answer and end of turn.
CHATML = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'system' %}<<SYS>>{{ m.content }}<</SYS>> "
    "{% elif m.role == 'user' %}<s>[INST] {{ m.content }} [/INST] "
    "{% else %}{% generation %}{{ m.content | trim }} </s>{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
# Like Qwen 3: an empty thought before the last answer, none before earlier ones.
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Rewrites what was said before: the number of messages stands at the beginning.
REWRITING = (
    "{{ messages | length }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)

SPEC = TaskSpec("talk", "instruct", None, "loss", False, ("messages",))
LIMITS = {"max_length": 256, "target_max_length": 64, "pack": True}


def with_template(tokenizer: Any, template: str | None) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def encoded(messages: list[dict[str, str]], tokenizer: Any, cache: Path, **limits: int) -> Any:
    return encode_rows(
        [{"messages": messages, "_at": "f:1"}], SPEC, LIMITS | limits, tokenizer, cache
    )


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA2, THINKING], ids=["chatml", "llama2", "thinking"]
)
@pytest.mark.parametrize("turns", [3, 5])
def test_the_loss_is_on_answers_alone(
    llama: Any, tmp_path: Path, template: str, turns: int
) -> None:
    tokenizer = with_template(llama, template)
    oracle = tokenizer.apply_chat_template(
        TALK[:turns], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    data = encoded(TALK[:turns], tokenizer, tmp_path)
    ids = data.slice("input_ids", 0).tolist()
    assert ids == oracle["input_ids"]
    labels = data.slice("token_labels", 0)
    mask = np.array(oracle["assistant_masks"], bool)
    assert 0 < mask.sum() < len(mask)
    assert (labels[mask] == np.array(ids)[mask]).all()
    assert (labels[~mask] == IGNORED).all()
    # A blank at the prompt's end joins the answer's first word, as everywhere with this template.
    prompt = write(TALK[: turns - 1], tokenizer, prompt=True).rstrip(" ")
    start = data.arrays["answer_starts"][0]
    assert ids[:start] == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_the_plain_template(llama: Any, tmp_path: Path) -> None:
    text, spans = answer_spans(TALK, llama)
    assert text == (
        "### System:\nBe kind.\n\n### User:\nOnce upon a time\n\n"
        "### Assistant:\nthere was a girl. user</s>\n\n### User:\nand then?\n\n"
        "### Assistant:\nShe was happy.</s>"
    )
    assert [text[a:b] for a, b in spans] == ["there was a girl. user</s>", "She was happy.</s>"]
    assert write(TALK[:2], llama, prompt=True) == text[: spans[0][0]]
    data = encoded(TALK, llama, tmp_path)
    ids, labels = data.slice("input_ids", 0), data.slice("token_labels", 0)
    assert ids[0] == llama.bos_token_id
    learnt = llama.decode(labels[labels != IGNORED])
    assert learnt == "there was a girl. user</s>She was happy.</s>"
    assert labels[-1] == llama.eos_token_id


def test_an_answer_that_repeats_its_question(llama: Any) -> None:
    echo = [{"role": "user", "content": "user"}, {"role": "assistant", "content": "user"}]
    for template in (None, CHATML, LLAMA2):
        text, ((start, end),) = answer_spans(echo, with_template(llama, template))
        assert text[start:end].startswith("user")
        assert start == text.rindex("user")


def test_a_template_that_rewrites_is_refused(llama: Any) -> None:
    with pytest.raises(UserError, match=r"chat template .* rewrites earlier turns"):
        answer_spans(TALK, with_template(llama, REWRITING))


def test_long_conversations_keep_an_answer(llama: Any, tmp_path: Path) -> None:
    whole = encoded(TALK, llama, tmp_path).slice("input_ids", 0)
    cut = encoded(TALK, llama, tmp_path, max_length=len(whole) - 3)
    assert cut.truncated == 1
    assert (cut.slice("input_ids", 0) == whole[:-3]).all()
    question = [{"role": "user", "content": "very long " * 50}, TALK[-1]]
    whole = encoded(question, llama, tmp_path).slice("input_ids", 0)
    data = encoded(question, llama, tmp_path, max_length=40)
    assert (data.slice("input_ids", 0) == whole[-40:]).all()
    labels = data.slice("token_labels", 0)
    assert llama.decode(labels[labels != IGNORED]) == "She was happy.</s>"
    start = data.arrays["answer_starts"][0]
    assert labels[start] != IGNORED and labels[start - 1] == IGNORED


def test_a_row_to_predict_is_its_prompt(llama: Any, tmp_path: Path) -> None:
    for template in (None, CHATML):
        tokenizer = with_template(llama, template)
        data = encoded(TALK[:4], tokenizer, tmp_path)
        assert "token_labels" not in data.arrays
        with_answer = encoded(TALK, tokenizer, tmp_path)
        start = with_answer.arrays["answer_starts"][0]
        assert (data.slice("input_ids", 0) == with_answer.slice("input_ids", 0)[:start]).all()
        assert data.arrays["answer_starts"][0] == start
