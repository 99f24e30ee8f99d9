"""A modality brick in the backbone: text untouched, rows on their own, other bricks beside it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cfm_train.bricks.kinds import make_brick
from cfm_train.errors import UserError
from cfm_train.modality.encoding import given
from cfm_train.modality.modality import Modality
from tests.backbones import answers, bare, randomise, tiny
from tests.peft_tuners import section

WIDTH = 6
CONNECTORS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "tokens": 2},
    "mlp": {"kind": "mlp", "tokens": 1, "inner": 10},
    "resampler": {"kind": "resampler", "tokens": 2, "depth": 2, "inner": 8, "heads": 2},
    "qformer": {
        "kind": "qformer", "tokens": 2, "layers": 2, "every": 1, "inner": 8, "heads": 2, "ff": 12,
    },
    "window_qformer": {
        "kind": "window_qformer", "window": 2, "tokens": 2, "layers": 1, "every": 1, "inner": 8,
        "heads": 2, "ff": 12,
    },
    "gated_cross_attention": {
        "kind": "gated_cross_attention", "tokens": 2, "depth": 1, "inner": 8, "heads": 2,
        "every": 1,
    },
}  # fmt: skip
#: Those whose items are tokens and nothing else.
EMBEDDED = [name for name in CONNECTORS if name != "gated_cross_attention"]


def modality(connector: str = "linear", seed: int = 1, tags: bool = True, name: str = "image"):
    """A modality brick that does something, for features of six numbers."""
    encoder = {"kind": "patches", "width": WIDTH, "fingerprint": "f" * 64}
    torch.manual_seed(seed)
    brick = Modality(name, encoder, CONNECTORS[connector], tags).build(tiny("llama")).eval()
    randomise(brick, seed)
    return brick


def features(rows: list[list[int]], seed: int = 0) -> list[list[np.ndarray]]:
    """Random features: for each row, vectors of each item."""
    draw = np.random.default_rng(seed)
    return [[draw.standard_normal((n, WIDTH)).astype(np.float32) for n in row] for row in rows]


def ids_of(brick: Modality, parts: list[Any], width: int) -> tuple[Tensor, Tensor]:
    """One row: numbers are token ids, arrays are items; padded on the right."""
    row: list[int] = []
    for part in parts:
        row += [part] if isinstance(part, int) else [brick.sentinel] * brick.count(len(part))
    mask = [1] * len(row) + [0] * (width - len(row))
    return torch.tensor(row + [0] * (width - len(row))), torch.tensor(mask)


@pytest.mark.parametrize("connector", EMBEDDED)
def test_placeholders_become_the_connectors_tokens(connector: str) -> None:
    """The oracle embeds by hand: the frozen embedding, with tokens put in between."""
    backbone, brick = tiny("llama"), modality(connector)
    (items,) = features([[3, 1]])
    ids, mask = ids_of(brick, [5, items[0], 9, items[1], 7], 30)
    embed = backbone.model.get_input_embeddings()
    parts = [embed(torch.tensor([5]))]
    for item, after in zip(items, (9, 7), strict=True):
        tokens, there = brick.tokens_of(torch.tensor(item)[None], torch.ones(1, len(item)).bool())
        parts += [tokens[there], embed(torch.tensor([after]))]
    by_hand = torch.cat(parts)[None]
    assert by_hand.shape[1] == int(mask.sum())
    expected = backbone.model(inputs_embeds=by_hand, use_cache=False).logits
    with backbone.slots.plugged([brick]):
        backbone.slots.take(given("image", [items]))
        found = backbone.logits(input_ids=ids[None], attention_mask=mask[None])
    torch.testing.assert_close(found[:, : by_hand.shape[1]], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_text_is_what_it_was_to_the_bit(connector: str) -> None:
    backbone, brick = tiny("llama"), modality(connector)
    inputs = {"input_ids": torch.tensor([[5, 9, 7, 3]]), "attention_mask": torch.ones(1, 4).long()}
    before, checksum = bare(backbone, inputs), backbone.checksum()
    with backbone.slots.plugged([brick]), torch.inference_mode():
        backbone.slots.take(given("image", features([[2]])))
        assert torch.equal(answers(backbone, inputs), before)
    assert torch.equal(bare(backbone, inputs), before)
    assert backbone.checksum() == checksum


@pytest.mark.parametrize("knowledge", ["prefix", "soft_prompt"])
def test_with_a_lora_and_virtual_tokens_rows_are_their_own(knowledge: str) -> None:
    """Five rows with other combinations of three bricks equal their solo runs."""
    backbone = tiny("llama")
    torch.manual_seed(3)
    lora, front = (make_brick(section(k)).build(backbone).eval() for k in ("lora", knowledge))
    randomise(lora)
    randomise(front)
    eyes = modality()
    rows = features([[2], [], [1, 3], [], [2]])
    weights = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 0, 1]]).float()
    width = 24
    parts = [[4, *items, 6, 8] for items in rows]
    pairs = [ids_of(eyes, part, width) for part in parts]
    ids, mask = torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
    with torch.inference_mode():
        with backbone.slots.plugged([lora, front, eyes], list(weights.T)):
            backbone.slots.take(given("image", rows))
            mixed = backbone.logits(input_ids=ids, attention_mask=mask)
        for i, row in enumerate(rows):
            bricks = [b for b, on in zip((lora, front, eyes), weights[i], strict=True) if on]
            length = int(mask[i].sum())
            with backbone.slots.plugged(bricks):
                backbone.slots.take(given("image", [row]))
                solo = backbone.logits(input_ids=ids[i : i + 1, :length])
            torch.testing.assert_close(mixed[i, :length], solo[0], atol=1e-5, rtol=0)


def test_two_modalities_in_one_prompt_and_what_is_refused() -> None:
    backbone = tiny("llama")
    eyes, ears = modality(), modality("mlp", seed=2, tags=False, name="audio")
    with pytest.raises(UserError, match="same placeholder"):
        backbone.slots.plug([eyes, ears])
    ears.sentinel = -3
    seen, heard = features([[2]]), features([[3]], seed=1)
    ids = torch.tensor([[5] + [-3] * ears.count(3) + [7] + [-2] * eyes.count(2) + [9]])
    with backbone.slots.plugged([eyes, ears]), torch.inference_mode():
        backbone.slots.take(given("image", seen) | given("audio", heard))
        both = backbone.logits(input_ids=ids)
        backbone.slots.take(given("image", seen) | given("audio", features([[3]], seed=2)))
        assert not torch.allclose(both, backbone.logits(input_ids=ids))
        backbone.slots.take(given("image", features([[1]])) | given("audio", heard))
        with pytest.raises(UserError, match="placeholders"):
            backbone.logits(input_ids=ids)
    with backbone.slots.plugged([eyes]), pytest.raises(UserError, match="No plugged brick"):
        backbone.slots.take(given("image", seen))
        backbone.logits(input_ids=ids)
    with backbone.slots.plugged([eyes], [torch.tensor([0.0, 1.0])]):
        backbone.slots.take(given("image", [*seen, *seen]))
        with pytest.raises(UserError, match="not plugged for it"):
            backbone.logits(input_ids=torch.tensor([[-2] * eyes.count(2)] * 2))


@pytest.mark.parametrize("connector", CONNECTORS)
def test_only_the_connector_learns_and_the_files_round_trip(connector: str) -> None:
    backbone, brick = tiny("llama"), modality(connector)
    rows = features([[2], [3]])
    pairs = [ids_of(brick, [4, *items, 6], 14) for items in rows]
    ids, mask = torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
    inputs = {"input_ids": ids, "attention_mask": mask}
    with backbone.slots.plugged([brick]):
        backbone.slots.take(given("image", rows))
        found = answers(backbone, inputs)
        found.square().mean().backward()
    for name, value in brick.named_parameters():
        assert value.grad is not None and value.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in backbone.parameters())
    interface = json.loads(json.dumps(brick.interface()))
    again = Modality.restore(interface, brick.files(), backbone).eval()
    with backbone.slots.plugged([again]), torch.inference_mode():
        backbone.slots.take(given("image", rows))
        assert torch.equal(answers(backbone, inputs), found)


def test_generation_with_a_cache_writes_what_it_writes_without() -> None:
    backbone, brick = tiny("llama"), modality()
    rows = features([[2]])
    ids = ids_of(brick, [4, *rows[0], 6], 8)[0][None]

    def write(use_cache: bool) -> Tensor:
        backbone.slots.take(given("image", rows))
        return backbone.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            use_cache=use_cache,
            num_return_sequences=1,
        )

    with backbone.slots.plugged([brick]):
        assert torch.equal(write(True), write(False))


def test_pixel_shuffle_puts_neighbours_together() -> None:
    """Against a loop over the grid, in the order of the rows."""
    from cfm_train.modality.connectors.connector import make_connector

    connector = make_connector({"kind": "pixel_shuffle", "factor": 2}).build(WIDTH, 5, 1.0)
    grid = torch.randn(1, 4, 4, WIDTH)
    tokens, there = connector(grid.reshape(1, 16, WIDTH), torch.ones(1, 16).bool())
    assert connector.count(16) == tokens.shape[1] == 4 and bool(there.all())
    for number, (y, x) in enumerate(((0, 0), (0, 2), (2, 0), (2, 2))):
        near = torch.cat([grid[0, y + i, x + j] for i in (0, 1) for j in (0, 1)])
        torch.testing.assert_close(tokens[0, number], connector.project(near))
    with pytest.raises(UserError, match="square grid"):
        connector.count(15)


def test_a_resampler_does_not_see_what_is_not_there() -> None:
    brick = modality("resampler", tags=False)
    item = torch.randn(1, 3, WIDTH)
    alone, _ = brick.tokens_of(item, torch.ones(1, 3).bool())
    wide = torch.cat([item, 100 * torch.randn(1, 2, WIDTH)], dim=1)
    beside, _ = brick.tokens_of(wide, torch.tensor([[True] * 3 + [False] * 2]))
    torch.testing.assert_close(beside, alone, atol=1e-6, rtol=0)


def test_a_feature_that_never_moved_is_not_loud_when_it_does() -> None:
    """A word of a table that no training row had: a bucket that was always zero."""
    brick = modality()
    draw = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(0))
    draw[:, 2] = 0.25
    draw[:, 3] = 1e-9 * draw[:, 3]
    brick.standardise(draw)
    deviation = brick.get_buffer("deviation")
    own = draw.double().std(dim=0, correction=0)
    expected = torch.where(own < 1e-3 * own.mean(), own.mean(), own).float()
    torch.testing.assert_close(deviation, expected)
    assert float((1 - brick.get_buffer("mean")[2]) / deviation[2]) < 2
    brick.standardise(draw[:1])
    assert torch.equal(brick.get_buffer("deviation"), torch.ones(WIDTH))
