"""Generation behind prompts and prefixes: cached, with beams, padded, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cfm_train.backbone.load import Backbone
from tests.backbones import tiny
from tests.port_cases import (
    CLOSE,
    DECODERS,
    prompt_of,
    random_prefix,
    recorded_prefix,
    run,
    tokens,
)


def write(backbone: Backbone, given: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The new tokens and their logits ``[steps, rows, vocabulary]``."""
    written = backbone.model.generate(  # type: ignore[operator]
        **given,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return written.sequences[:, -5:], torch.stack(written.logits)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_beams": 3},
    {"use_cache": False},
    {"cache_implementation": "static"},
]


def _name(options: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items()) or "greedy"


@pytest.mark.parametrize("options", OPTIONS, ids=_name)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", DECODERS)
def test_generation_behind_a_prompt_or_prefix_equals_typed_text(
    family: str, padded: bool, options: dict[str, Any]
) -> None:
    """Two rows: one carries the text as a prompt or prefix, the other does not."""
    backbone = tiny(family)
    text, ids = tokens(1, 4, seed=8)[0], tokens(2, 6, seed=9)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :2] = 0
    ids = ids * mask
    given = {"input_ids": ids, "attention_mask": mask}
    typed = {
        "input_ids": torch.stack([torch.cat([text, ids[0]]), torch.cat([text * 0, ids[1]])]),
        "attention_mask": torch.stack(
            [torch.cat([text * 0 + 1, mask[0]]), torch.cat([text * 0, mask[1]])]
        ),
    }
    expected = write(backbone, typed, **options)
    prefix = recorded_prefix(backbone, {"input_ids": typed["input_ids"][:1]}, {"": 4})
    for brick in (prompt_of(backbone, text), prefix):
        with backbone.slots.plugged([brick], [torch.tensor([1.0, 0.0])]):
            found = write(backbone, given, **options)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=_name)
def test_generation_of_an_encoder_decoder_equals_typed_text(options: dict[str, Any]) -> None:
    backbone = tiny("t5")
    text, ids = tokens(1, 4, seed=8)[0], tokens(2, 6, seed=9)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    given = {"input_ids": ids * mask, "attention_mask": mask}
    typed = {
        "input_ids": torch.stack(
            [torch.cat([text, ids[0]]), torch.cat([text * 0, ids[1] * mask[1]])]
        ),
        "attention_mask": torch.stack(
            [torch.cat([text * 0 + 1, mask[0]]), torch.cat([text * 0, mask[1]])]
        ),
    }
    expected = write(backbone, typed, **options)
    weights = [torch.tensor([1.0, 0.0])]
    with backbone.slots.plugged([prompt_of(backbone, text)], weights):
        found = write(backbone, given, **options)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=1e-4)
    with backbone.slots.plugged([random_prefix(backbone, 3, seed=1)], weights):
        found = write(backbone, given, **options)
        slow = write(backbone, given, use_cache=False, num_beams=options.get("num_beams", 1))
    assert torch.equal(found[0], slow[0])
    torch.testing.assert_close(found[1], slow[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_a_cache_from_a_plain_pass_goes_on_where_it_stood(family: str) -> None:
    """A loop of one's own: no mask, no positions, and unplugging in the middle changes nothing."""
    backbone = tiny(family)
    ids = tokens(2, 6, seed=1)
    brick = prompt_of(backbone, tokens(1, 3, seed=2)[0])
    expected = run(backbone, {"input_ids": ids}, brick)
    with torch.inference_mode():
        with backbone.slots.plugged([brick]):
            first = backbone.model(ids[:, :3], use_cache=True)
            second = backbone.model(ids[:, 3:5], past_key_values=first.past_key_values)
        third = backbone.model(ids[:, 5:], past_key_values=second.past_key_values)
    found = torch.cat([first.logits, second.logits, third.logits], 1)
    torch.testing.assert_close(found, expected, **CLOSE)
