"""The forms that rows with items come in, each read into one: items, and texts with their places.

    {"image": "a/1.png", "text": "a red square"}             item and text, or texts
    {"series": [[1, 2], [3, 4]], "text": "it rises"}         the item itself: steps of two channels
    {"image": "1.png", "conversations": [{"from": "human", "value": "<image>\\n…"}, …]}     LLaVA's
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "1.png"},
                                               {"type": "text", "text": "…"}]}, …]}   typed parts

Several items of a row are a list of paths, of objects, or of series that are lists of lists. A run
may read several modalities: a row then has a column for each, or typed parts of all of them,
and ``<image>`` and ``<audio>`` stand where the items go, those of one modality in their order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cfm_train.data.conversations import ROLES
from cfm_train.data.rows import Row
from cfm_train.errors import UserError

#: Where the items go in a prompt, whatever they are.
ITEM = "<item>"
#: A reference that is itself the item, as JSON: a table's row, a series.
INLINE = "json:"
#: The modality of which a row without an item is one itself, but for the text that is said of it.
WHOLE = "table"


def rows_of(
    values: Mapping[str, Any], at: str, section: Mapping[str, Any], modalities: Sequence[str]
) -> list[Row]:
    """One line as rows, without hashes: one row, or one for each text.

    Args:
        values: the line.
        at: where it stands.
        section: ``text``, the column of what is said.
        modalities: what the items of the run are called.

    Raises:
        UserError: the line has none of the forms.
    """
    messages = values.get("messages", values.get("conversations"))
    found: list[tuple[str, Any]] = []
    for kind in modalities:
        given = values.get(kind, values.get("item") if len(modalities) == 1 else None)
        if given is None and messages is None and list(modalities) == [WHOLE]:
            given = {name: value for name, value in values.items() if name != section["text"]}
        if given is not None:
            found += [(kind, one) for one in (given if _is_list_of_items(given) else [given])]
    if messages is not None:
        turns, more = _turns(messages, at, modalities)
        found += more
        for kind in modalities:
            items = [one for modality, one in found if modality == kind]
            held = sum(turn["content"].count(f"<{kind}>") for turn in turns)
            if held == 0 and items:
                first = next(turn for turn in turns if turn["role"] == "user")
                first["content"] = f"<{kind}>" * len(items) + "\n" + first["content"]
            elif held != len(items):
                stop(at, f"{held} times <{kind}> in the messages, but {len(items)} items")
        return [{**_items(found, at), "turns": turns, "_at": at}]
    if not found:
        stop(at, f"there is no column '{modalities[0]}', and no messages")
    said = values.get(section["text"])
    texts = said if isinstance(said, list) and said else [said]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        stop(at, f"the column '{section['text']}' must be a text or several (data.text=COLUMN)")
    return [{**_items(found, at), "answer": text, "_at": at} for text in texts]


def _items(found: Sequence[tuple[str, Any]], at: str) -> Row:
    return {
        "_items": [_reference(one, at) for _, one in found],
        "_kinds": [kind for kind, _ in found],
    }


def _is_list_of_items(given: Any) -> bool:
    """Several items; a list of numbers, or of lists of numbers, is one: a series."""
    if not isinstance(given, list):
        return False
    return all(
        isinstance(one, str | dict)
        or (isinstance(one, list) and len(one) > 0 and isinstance(one[0], list))
        for one in given
    )


def _reference(item: Any, at: str) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, dict | list):
        try:
            return INLINE + json.dumps(item, sort_keys=True, separators=(",", ":"))
        except TypeError as error:  # dates and the like, from Parquet
            stop(at, f"an item that stands in its row is numbers and texts ({error})")
    stop(at, f"an item is a path, or the item itself as a list or an object, found {item!r}")
    raise AssertionError


def _turns(
    messages: Any, at: str, modalities: Sequence[str]
) -> tuple[list[dict[str, str]], list[tuple[str, Any]]]:
    """Messages with plain texts, and the items of their typed parts in order."""
    if not isinstance(messages, list) or not messages:
        stop(at, "messages must be a list of {role, content}")
    turns, items = [], []
    known = " or ".join(modalities)
    for message in messages:
        role = message.get("role", message.get("from")) if isinstance(message, dict) else None
        content = message.get("content", message.get("value")) if role in ROLES else None
        if role not in ROLES:
            stop(at, f"a message's role is system, user or assistant, found {role!r}")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        text = ""
        for found in parts:
            part: dict[str, Any] = found if isinstance(found, dict) else {}
            kind = str(part.get("type", ""))
            if kind == "text" and isinstance(part.get("text"), str):
                text += str(part["text"])
            elif isinstance(kind, str) and kind in modalities:
                text += f"<{kind}>"
                if (one := part.get(kind, part.get("path", part.get("url")))) is not None:
                    items.append((kind, one))
            else:
                stop(at, f"a part of a message is a text or of type {known}, found {kind!r}")
        turns.append({"role": ROLES[str(role)], "content": text})
    roles = [t["role"] for t in turns if t["role"] != "system" or t is not turns[0]]
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)) or not roles:
        stop(at, "user and assistant must take turns, the user first, after one system message")
    if roles[-1] != "assistant":
        stop(at, "the last message must be the assistant's")
    for kind in modalities:
        if any(f"<{kind}>" in t["content"] for t in turns if t["role"] == "assistant"):
            stop(at, f"an answer cannot hold <{kind}>: the model writes text")
    return turns, items


def marked(prompt: str, kinds: Sequence[str], modalities: Sequence[str], at: str) -> str:
    """A prompt with one ``<modality>`` for each item; one that names no place has them in front.

    Args:
        prompt: ``<item>``, or ``<image>`` and the like, says where the items go; a place that is
            named once takes all items of its modality.
        kinds: the modality of each item.
        modalities: those of the run.
        at: where the row stands.

    Raises:
        UserError: the prompt has several places, and the row another number of items.
    """
    known = list(dict.fromkeys(kinds))
    for kind in modalities:
        if kind not in known and f"<{kind}>" in prompt:
            stop(at, f"the prompt has a place for <{kind}>, and the row no such item")
    prompt = prompt.replace(ITEM, "".join(f"<{kind}>" for kind in known))
    for kind in reversed(known):
        marker, items = f"<{kind}>", list(kinds).count(kind)
        held = prompt.count(marker)
        if held == 0:
            prompt = marker * items + prompt
        elif held == 1:
            prompt = prompt.replace(marker, marker * items)
        elif held != items:
            stop(at, f"the prompt has {held} places for items, and the row {items}")
    return prompt


def stop(at: str, why: str) -> Any:
    """Raises what is wrong with a row, as a sentence."""
    raise UserError(f"{at}: {why}.")
