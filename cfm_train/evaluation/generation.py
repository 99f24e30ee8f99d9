"""Greedy answers of a language model, as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from cfm_train.backbone.load import Backbone
from cfm_train.data.encode import Encoded
from cfm_train.data.tasks import TaskSpec
from cfm_train.errors import UserError

#: Rows generated together.
ROWS = 16


@torch.inference_mode()
def answer_texts(
    backbone: Backbone, spec: TaskSpec, encoded: Encoded, rows: Iterable[int], limit: int = 128
) -> list[tuple[str, str]]:
    """What the backbone, as it is plugged, writes for some rows, and what would be right.

    Args:
        backbone: a language model.
        spec: a ``seq2seq`` or ``instruct`` task, or ``causal`` (the second half of the text is
        asked for). encoded: the split.
        rows: row numbers.
        limit: most new tokens; fewer where all right answers are shorter than half of it.

    Returns:
        (said, right) for each row.
    """
    pairs = [_prompt_and_target(spec, encoded, row) for row in rows]
    answers: list[tuple[str, str]] = []
    for start in range(0, len(pairs), ROWS):
        prompts, targets = zip(*pairs[start : start + ROWS], strict=True)
        longest = max(len(target) for target in targets) or limit
        said = write(backbone, prompts, min(limit, max(8, 2 * longest)))
        right = backbone.tokenizer.batch_decode(list(targets), skip_special_tokens=True)
        answers += [(a.strip(), b.strip()) for a, b in zip(said, right, strict=True)]
    return answers


@torch.inference_mode()
def write(backbone: Backbone, prompts: Sequence[list[int]], most: int) -> list[str]:
    """What a language model, as it is plugged, writes after some prompts, greedily.

    Args:
        backbone: a language model.
        prompts: token ids, all in one batch.
        most: most new tokens.
    """
    tokenizer = backbone.tokenizer
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    left = backbone.family == "decoder"  # what is generated follows the last prompt token
    for i, prompt in enumerate(prompts):
        where = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[i, where] = torch.tensor(prompt)
        mask[i, where] = 1
    written = backbone.model.generate(
        input_ids=ids.to(backbone.device),
        attention_mask=mask.to(backbone.device),
        max_new_tokens=most,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = written[:, width:] if left else written
    texts: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def prompt_text(backbone: Backbone, spec: TaskSpec, encoded: Encoded, row: int) -> str:
    """What `answer_texts` gives the backbone for a row, as text."""
    prompt, _ = _prompt_and_target(spec, encoded, row)
    return str(backbone.tokenizer.decode(prompt, skip_special_tokens=True)).strip()


def _prompt_and_target(spec: TaskSpec, encoded: Encoded, row: int) -> tuple[list[int], list[int]]:
    """Token ids that the model is given, and those that it should write."""
    ids = encoded.slice("input_ids", row).tolist()
    if spec.type == "seq2seq":
        known = "target_ids" in encoded.arrays
        return ids, encoded.slice("target_ids", row).tolist() if known else []
    if "answer_starts" in encoded.arrays:  # the last answer of a conversation, or a bare prompt
        start = int(encoded.arrays["answer_starts"][row])
        return ids[:start], ids[start:]
    if spec.type == "causal":
        half = max(1, len(ids) // 2)
        return ids[:half], ids[half:]
    raise UserError(f"The task '{spec.name}' ({spec.type}) has no written answers.")
