"""How the rows of each task type become token numbers: one function per type, found by its name.

Every encoder returns flat arrays, rows behind each other: ``input_ids`` [tokens] and ``offsets``
[rows + 1], and the answers, one per row (``labels``) or one per token (``token_labels``, with -100
where there is nothing to learn; token i's own number stands at i, the objective shifts). Beside
them it says how many rows were longer than the limit and cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cfm_train.data.conversations import answer_spans, write
from cfm_train.data.packing import pack
from cfm_train.data.rows import Row
from cfm_train.data.tagging import first_tokens
from cfm_train.data.tasks import IGNORED, TaskSpec

Arrays = dict[str, np.ndarray]

#: Rows handed to the tokenizer at a time: enough for its threads, little beside the result.
CHUNK = 2000


@dataclass(frozen=True)
class Settings:
    """What besides the rows and the tokenizer decides the numbers.

    Attributes:
        max_length: most tokens of a row; longer ones are cut.
        target_max_length: most tokens of an answer (seq2seq).
        pack: whether documents share rows (causal).
    """

    max_length: int
    target_max_length: int
    pack: bool


def flat(
    sequences: Sequence[Sequence[int]], dtype: Any = np.int32
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences behind each other, and where each begins: ``[tokens]`` and int64 ``[rows + 1]``."""
    offsets = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum([len(sequence) for sequence in sequences], out=offsets[1:])
    values = np.empty(offsets[-1], dtype)
    for sequence, start, end in zip(sequences, offsets[:-1], offsets[1:], strict=True):
        values[start:end] = sequence
    return values, offsets


def _texts(rows: list[Row], tokenizer: Any, limit: int) -> tuple[Arrays, np.ndarray]:
    """One text or a pair per row, with the tokenizer's own special tokens; and which were cut."""
    ids: list[list[int]] = []
    types: list[list[int]] = []
    cut: list[bool] = []
    pair = len(rows[0]["text"]) == 2
    for start in range(0, len(rows), CHUNK):
        columns = list(zip(*(row["text"] for row in rows[start : start + CHUNK]), strict=True))
        batch = tokenizer(
            *(list(column) for column in columns), truncation=True, max_length=limit, padding=False
        )
        ids += batch["input_ids"]
        # Which of the two texts a token is of; only some models were trained to read it.
        if pair and "token_type_ids" in batch:
            types += batch["token_type_ids"]
        cut += [bool(encoding.overflowing) for encoding in batch.encodings]
    arrays: Arrays = {}
    arrays["input_ids"], arrays["offsets"] = flat(ids)
    if types:
        arrays["token_type_ids"] = flat(types, np.int8)[0]
    return arrays, np.array(cut)


def encode_classification(
    rows: list[Row], spec: TaskSpec, tokenizer: Any, settings: Settings
) -> tuple[Arrays, int]:
    """``labels`` int64 [rows], positions in ``spec.labels``."""
    arrays, cut = _texts(rows, tokenizer, settings.max_length)
    if "label" in rows[0]:
        arrays["labels"] = np.array([row["label"] for row in rows], np.int64)
    return arrays, int(cut.sum())


def encode_multilabel(
    rows: list[Row], spec: TaskSpec, tokenizer: Any, settings: Settings
) -> tuple[Arrays, int]:
    """``labels`` float32 [rows, labels], 1 where a label holds."""
    arrays, cut = _texts(rows, tokenizer, settings.max_length)
    if "label" in rows[0]:
        arrays["labels"] = np.zeros((len(rows), len(spec.labels or ())), np.float32)
        for hot, row in zip(arrays["labels"], rows, strict=True):
            hot[row["label"]] = 1
    return arrays, int(cut.sum())


def encode_regression(
    rows: list[Row], spec: TaskSpec, tokenizer: Any, settings: Settings
) -> tuple[Arrays, int]:
    """``labels`` float32 [rows]."""
    arrays, cut = _texts(rows, tokenizer, settings.max_length)
    if "label" in rows[0]:
        arrays["labels"] = np.array([row["label"] for row in rows], np.float32)
    return arrays, int(cut.sum())


def encode_token(
    rows: list[Row], spec: TaskSpec, tokenizer: Any, settings: Settings
) -> tuple[Arrays, int]:
    """``token_labels`` with the word's tag on its first sub-word and -100 on the others.

    ``first_tokens`` int32 says for each word (``word_offsets`` [rows + 1]) which token of its row
    that is; -1 where the row was cut before it, or where the tokenizer drops the word's characters.
    """
    arrays: Arrays = {}
    ids: list[list[int]] = []
    firsts: list[list[int]] = []
    labels: list[list[int]] = []
    truncated = 0
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        batch = tokenizer(
            [row["text"][0] for row in chunk],
            truncation=True,
            max_length=settings.max_length,
            return_offsets_mapping=True,
        )
        truncated += sum(bool(encoding.overflowing) for encoding in batch.encodings)
        for row, tokens, spans in zip(
            chunk, batch["input_ids"], batch["offset_mapping"], strict=True
        ):
            first = first_tokens(row["words"], spans)
            ids.append(tokens)
            firsts.append(first)
            labels.append([IGNORED] * len(tokens))
            for place, tag in zip(first, row.get("label", ()), strict=False):
                if place >= 0:
                    labels[-1][place] = tag
    arrays["input_ids"], arrays["offsets"] = flat(ids)
    arrays["first_tokens"], arrays["word_offsets"] = flat(firsts)
    if "label" in rows[0]:
        arrays["token_labels"] = flat(labels)[0]
    return arrays, truncated


def encode_causal(
    rows: list[Row], spec: TaskSpec, tokenizer: Any, settings: Settings
) -> tuple[Arrays, int]:
    """Documents, each closed by the end-of-text token, alone in a row or packed into blocks.

    A document longer than a row goes on in the next piece, repeating its last token for context, so
    that every token but a document's first is predicted exactly once. In a block every piece has
    ``position_ids`` from 0 and predicts nothing across its border; a model that is given them
    without a mask keeps the pieces apart in attention too.
    ``block_rows`` (``block_offsets`` [blocks + 1]) says which documents a block holds. Rows to
    continue are never packed: the last tokens that fit, ``answer_starts`` as for ``instruct``.
    """
    if rows[0].get("prompt"):
        return _prompts([row["text"][0] for row in rows], tokenizer, settings)
    pieces, owners = document_pieces(rows, tokenizer, settings)
    return in_blocks(pieces, pieces, owners, settings), 0


def document_pieces(
    rows: list[Row], tokenizer: Any, settings: Settings
) -> tuple[list[list[int]], list[int]]:
    """Documents as pieces of at most ``max_length`` tokens, and the number of each one's row."""
    end = tokenizer.eos_token_id
    pieces: list[list[int]] = []
    owners: list[int] = []
    for start in range(0, len(rows), CHUNK):
        texts = [row["text"][0] for row in rows[start : start + CHUNK]]
        for i, ids in enumerate(
            tokenizer(texts, truncation=False, verbose=False)["input_ids"], start
        ):
            document = ids if end is None or (ids and ids[-1] == end) else [*ids, end]
            for begin in range(0, len(document) - 1, settings.max_length - 1):
                pieces.append(document[begin : begin + settings.max_length])
                owners.append(i)
    return pieces, owners


def in_blocks(
    pieces: list[list[int]], labels: list[list[int]], owners: list[int], settings: Settings
) -> Arrays:
    """Pieces packed into blocks, or each alone; see `encode_causal`.

    Args:
        pieces: token ids, each at most ``max_length`` long.
        labels: what each of their tokens is to be learnt as, -100 for not at all.
        owners: the number of each piece's row.
        settings: the limit, and whether pieces share blocks.
    """
    sizes = [len(piece) for piece in pieces]
    blocks = (
        pack(sizes, settings.max_length) if settings.pack else [[i] for i in range(len(pieces))]
    )
    arrays: Arrays = {}
    order = [i for block in blocks for i in block]
    arrays["input_ids"], starts = flat([pieces[i] for i in order])
    ends = np.cumsum([len(block) for block in blocks])
    arrays["offsets"] = np.concatenate([[0], starts[ends]]).astype(np.int64)
    arrays["token_labels"] = flat([labels[i] for i in order])[0]
    arrays["token_labels"][starts[:-1]] = IGNORED
    arrays["block_rows"], arrays["block_offsets"] = flat(
        [[owners[i] for i in block] for block in blocks]
    )
    if settings.pack:
        lengths = np.diff(starts)
        positions = np.arange(len(arrays["input_ids"])) - np.repeat(starts[:-1], lengths)
        arrays["position_ids"] = positions.astype(np.int32)
    return arrays


def _prompts(texts: list[str], tokenizer: Any, settings: Settings) -> tuple[Arrays, int]:
    """Texts to continue: no end-of-text token, cut at their beginnings."""
    whole = [tokenizer(text, truncation=False, verbose=False)["input_ids"] for text in texts]
    end = tokenizer.eos_token_id
    # Some tokenizers close every text; nothing would follow a closed one.
    whole = [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in whole]
    ids, offsets = flat([ids[-settings.max_length :] for ids in whole])
    cut = sum(len(ids) > settings.max_length for ids in whole)
    starts = np.diff(offsets).astype(np.int32)
    return {"input_ids": ids, "offsets": offsets, "answer_starts": starts}, cut


def encode_instruct(
    rows: list[Row], spec: TaskSpec, tokenizer: Any, settings: Settings
) -> tuple[Arrays, int]:
    """Conversations; ``token_labels`` on the answers and the marks that end them.

    A row that is too long is cut at its end, or at its beginning where no answer would be left.
    ``answer_starts`` int32 [rows] is the number of tokens before the last answer: the prompt. Rows
    to predict are prompts as a whole.
    """
    arrays: Arrays = {}
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    begins: list[int] = []
    truncated = 0
    answers = rows[0]["messages"][-1]["role"] == "assistant"
    # A template writes every special token itself.
    special = not tokenizer.chat_template
    for row in rows:
        if answers:
            text, spans = answer_spans(row["messages"], tokenizer)
        else:
            text, spans = write(row["messages"], tokenizer, prompt=True), []
        encoded = tokenizer(
            text,
            add_special_tokens=special,
            return_offsets_mapping=True,
            truncation=False,
            verbose=False,
        )
        tokens, marks = encoded["input_ids"], [IGNORED] * len(encoded["input_ids"])
        begin = len(tokens)
        for a, b in spans:
            inside = [
                i for i, (s, e) in enumerate(encoded["offset_mapping"]) if a < e <= b and s < e
            ]
            begin = inside[0] if inside else begin
            for i in inside:
                marks[i] = tokens[i]
        if len(tokens) > settings.max_length:
            truncated += 1
            keep = slice(0, settings.max_length)
            if not answers or all(mark == IGNORED for mark in marks[keep]):
                keep = slice(len(tokens) - settings.max_length, None)
                begin -= keep.start
            tokens, marks = tokens[keep], marks[keep]
        ids.append(tokens)
        labels.append(marks)
        begins.append(min(max(begin, 0), len(tokens)))
    arrays["input_ids"], arrays["offsets"] = flat(ids)
    arrays["answer_starts"] = np.array(begins, np.int32)
    if answers:
        arrays["token_labels"] = flat(labels)[0]
    return arrays, truncated


def encode_seq2seq(
    rows: list[Row], spec: TaskSpec, tokenizer: Any, settings: Settings
) -> tuple[Arrays, int]:
    """``target_ids`` int32 behind each other, and ``target_offsets`` [rows + 1]."""
    arrays, cut = _texts(rows, tokenizer, settings.max_length)
    if "target" in rows[0]:
        ids: list[list[int]] = []
        for start in range(0, len(rows), CHUNK):
            batch = tokenizer(
                text_target=[row["target"] for row in rows[start : start + CHUNK]],
                truncation=True,
                max_length=settings.target_max_length,
            )
            ids += batch["input_ids"]
            cut[start : start + CHUNK] |= [
                bool(encoding.overflowing) for encoding in batch.encodings
            ]
        arrays["target_ids"], arrays["target_offsets"] = flat(ids)
    return arrays, int(cut.sum())
