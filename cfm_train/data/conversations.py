"""Conversations: read from data, written out as text, with the answers' places marked.

The tokenizer's own chat template is used where it has one. Else the plain template

    ### System:⏎{content}⏎⏎### User:⏎{content}⏎⏎### Assistant:⏎{content}{eos}

whose blocks are parted by an empty line. Loss is taken on the answers alone, each with the mark
that ends its turn, since a model must learn to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cfm_train.data.files import type_name
from cfm_train.data.labels import BadRow
from cfm_train.errors import UserError

Message = dict[str, str]

#: How data sets name the speakers; the values are the names that chat templates know.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


def joined(texts: Sequence[str]) -> str:
    """Texts with an empty line between, blank ones left out (an instruction and its input)."""
    return "\n\n".join(text for text in texts if text.strip())


def conversation(value: Any, answers: bool) -> list[Message]:
    """A conversation from a cell: ``[{"role", "content"}, …]`` or ``[{"from", "value"}, …]``.

    Args:
        value: the cell.
        answers: whether the last message must be an answer; else it must be the user's.

    Raises:
        BadRow: not a list of messages, an unknown speaker, an empty text, or speakers out of turn.
    """
    if not isinstance(value, list) or not value:
        raise BadRow(f"messages must be a list of {{role, content}}, found {type_name(value)}")
    messages: list[Message] = []
    for item in value:
        if not isinstance(item, dict):
            raise BadRow(f"a message is {{role, content}}, found {type_name(item)}")
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if role not in ROLES:
            raise BadRow(f"a message's role is system, user or assistant, found {role!r}")
        if not isinstance(content, str) or not content.strip():
            raise BadRow(f"the {ROLES[role]}'s message is empty")
        messages.append({"role": ROLES[role], "content": content})
    turns = [m["role"] for m in messages if m["role"] != "system" or m is not messages[0]]
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        raise BadRow("user and assistant must take turns, the user first, after one system message")
    if not turns or (turns[-1] == "assistant") != answers:
        raise BadRow(f"the last message must be the {'assistant' if answers else 'user'}'s")
    return messages


def write(messages: Sequence[Message], tokenizer: Any, *, prompt: bool = False) -> str:
    """A conversation as the text that the model reads.

    Args:
        messages: the conversation.
        tokenizer: the backbone's; its chat template is used where it has one.
        prompt: whether the text ends where an answer is to begin.
    """
    if tokenizer.chat_template:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt
            )
        )
    eos = tokenizer.eos_token or ""
    blocks = [
        f"### {m['role'].capitalize()}:\n{m['content']}{eos if m['role'] == 'assistant' else ''}"
        for m in messages
    ]
    return "\n\n".join([*blocks, "### Assistant:\n"] if prompt else blocks)


def answer_spans(messages: Sequence[Message], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """A whole conversation as text, and the characters of its answers.

    An answer begins where the text of all earlier messages, asked for an answer, ends; it goes on
    to the end of its content and the mark that ends the turn. Found this way the spans hold for
    templates that change the last turn (Qwen 3 writes an empty thought there).

    Returns:
        The text, and ``(start, end)`` for each answer.

    Raises:
        UserError: the template rewrites earlier turns, so that answers cannot be told from prompts.
    """
    text = write(messages, tokenizer)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = write(messages[:i], tokenizer, prompt=True)
        content = message["content"] if message["content"] in text else message["content"].strip()
        at = text.find(content, len(before))
        if not text.startswith(before) or at < 0:
            raise UserError(
                f"backbone: the chat template of {tokenizer.name_or_path} rewrites earlier turns, "
                "so that answers cannot be marked; give one question and one answer per row."
            )
        spans.append((len(before), at + len(content)))
    mark = text[spans[-1][1] :].rstrip()
    return text, [(a, b + len(mark) if text.startswith(mark, b) else b) for a, b in spans]
