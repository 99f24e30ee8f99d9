"""Greedy answers to prompts with items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cfm_train.backbone.load import Backbone
from cfm_train.data.tasks import IGNORED
from cfm_train.errors import UserError
from cfm_train.modality.encoding import ItemRows


def write_answers(
    backbone: Backbone, rows: ItemRows, count: int, limit: int = 48
) -> list[dict[str, Any]]:
    """What the backbone, as it is plugged, writes for the first rows, as the record's samples.

    Args:
        backbone: the language model with its modality brick.
        rows: a split.
        count: how many rows.
        limit: most new tokens.
    """
    samples = []
    tokenizer = backbone.tokenizer
    for i in range(min(count, len(rows))):
        start = int(rows.arrays["answer_starts"][i])
        prompt = rows.slice("input_ids", i)[:start].tolist()
        labels = rows.slice("token_labels", i)
        wanted = labels[labels != IGNORED].tolist()
        right = str(tokenizer.decode(wanted, skip_special_tokens=True))
        row = rows.rows[i]
        said = generate(backbone, prompt, rows.extras([i]), limit)
        asked = row["prompt"] if "prompt" in row else row["turns"][0]["content"]
        samples.append(
            {
                "input": f"{asked} ({', '.join(one[:80] for one in row['_items'])})",
                "prediction": said,
                "reference": right.strip(),
                "at": str(row["_at"]),
            }
        )
    return samples


def generate(
    backbone: Backbone, prompt: Sequence[int], batch: Mapping[str, Any], limit: int
) -> str:
    """What the backbone, as it is plugged, writes after one prompt, see `write_texts`."""
    return write_texts(backbone, [prompt], batch, limit)[0]


@torch.inference_mode()
def write_texts(
    backbone: Backbone, prompts: Sequence[Sequence[int]], batch: Mapping[str, Any], limit: int
) -> list[str]:
    """What the backbone, as it is plugged, writes after some prompts, greedily.

    Args:
        backbone: the language model.
        prompts: token ids, placeholders among them; all of one length.
        batch: the features of the prompts' items, see `Modality.take`.
        limit: most new tokens.

    Raises:
        UserError: the backbone writes no text after a prompt.
    """
    if backbone.family != "decoder" or backbone.model.get_output_embeddings() is None:
        raise UserError(
            f"The backbone '{backbone.id}' is no language model that reads from left to right: it "
            "cannot go on after a prompt; recipe=predict has the answers of its bricks."
        )
    tokenizer = backbone.tokenizer
    ids = torch.tensor([list(prompt) for prompt in prompts], device=backbone.device)
    # Greedy, whatever the model's generation_config.json says: a penalty on what was there before
    # would make it something else, and looks ids up that placeholders have none of.
    backbone.slots.take(batch)
    written = backbone.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=limit,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
    return [str(text).strip() for text in texts]
