"""Q-Formers against BLIP-2's own, windows one by one, gated attention by a loop over tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cfm_train.bricks.kinds import make_brick
from cfm_train.errors import UserError
from cfm_train.modality.connectors.connector import make_connector
from cfm_train.modality.connectors.qformer import QFormer
from cfm_train.modality.encoding import given
from cfm_train.modality.modality import Modality
from cfm_train.modality.scoring import class_scores
from tests.backbones import answers, bare, randomise, tiny
from tests.modality.test_modality import CONNECTORS, WIDTH, features, ids_of
from tests.peft_tuners import section

QFORMER = {
    "kind": "qformer", "tokens": 3, "layers": 3, "every": 2, "inner": 8, "heads": 2, "ff": 12,
}  # fmt: skip


def test_a_qformer_is_blip2s() -> None:
    """Its weights copied into transformers' own, some features missing."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    config = Blip2QFormerConfig(
        hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12,
        cross_attention_frequency=2, encoder_hidden_size=WIDTH, use_qformer_text_input=False,
    )  # fmt: skip
    theirs = Blip2QFormerModel(config).eval()
    ours = make_connector(QFORMER).build(WIDTH, 5, 1.0).eval()
    assert isinstance(ours, QFormer)
    randomise(ours, 3)
    theirs.layernorm.load_state_dict(ours.norm.state_dict())
    for one, other in zip(ours.stack, theirs.encoder.layer, strict=True):
        pairs = [(one.among, other.attention)]
        pairs += [] if one.across is None else [(one.across, other.crossattention)]
        assert other.has_cross_attention == (one.across is not None)
        for mine, his in pairs:
            names = {"q": "query", "k": "key", "v": "value"}
            for short, name in names.items():
                getattr(his.attention, name).load_state_dict(getattr(mine, short).state_dict())
            his.output.dense.load_state_dict(mine.o.state_dict())
            his.output.LayerNorm.load_state_dict(mine.norm.state_dict())
        other.intermediate_query.dense.load_state_dict(one.up.state_dict())
        other.output_query.dense.load_state_dict(one.down.state_dict())
        other.output_query.LayerNorm.load_state_dict(one.norm.state_dict())
    v, mask = torch.randn(2, 4, WIDTH), torch.tensor([[True] * 4, [True, True, False, False]])
    with torch.inference_mode():
        found = ours.asked(v, mask)
        expected = theirs(
            query_embeds=ours.queries.expand(2, -1, -1),
            encoder_hidden_states=v,
            encoder_attention_mask=mask.long(),
        ).last_hidden_state
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        tokens, there = ours(v, mask)
        torch.testing.assert_close(tokens, ours.leave(found))
    assert there.all() and tokens.shape == (2, ours.count(4), 5)


def test_windows_are_asked_one_by_one_and_a_ragged_end_is_an_item_of_its_own() -> None:
    ours = make_connector({**QFORMER, "kind": "window_qformer", "window": 3}).build(WIDTH, 5, 1.0)
    randomise(ours, 4)
    plain = make_connector(QFORMER).build(WIDTH, 5, 1.0)
    plain.load_state_dict(ours.state_dict())
    v = torch.randn(3, 8, WIDTH)
    lengths = [8, 4, 3]
    mask = torch.arange(8)[None] < torch.tensor(lengths)[:, None]
    with torch.inference_mode():
        tokens, there = ours(v.masked_fill(~mask[..., None], 0), mask)
        for item, (n, count) in enumerate(zip(lengths, (9, 6, 3), strict=True)):
            assert ours.count(n) == count == int(there[item].sum())
            assert bool(there[item, :count].all())
            parts = [v[item, at : min(n, at + 3)][None] for at in range(0, n, 3)]
            alone = [plain(p, torch.ones(p.shape[:2], dtype=torch.bool))[0][0] for p in parts]
            torch.testing.assert_close(tokens[item, :count], torch.cat(alone), atol=1e-5, rtol=0)


def gated(seed: int = 1, tags: bool = False, every: int = 1, new: bool = False) -> Modality:
    """A gated brick that does something, unless it is new."""
    encoder = {"kind": "patches", "width": WIDTH, "fingerprint": "f" * 64}
    connector = CONNECTORS["gated_cross_attention"] | {"every": every}
    torch.manual_seed(seed)
    brick = Modality("image", encoder, connector, tags).build(tiny("llama")).eval()
    if not new:
        randomise(brick, seed)
    return brick


def test_shut_gates_change_no_logit_and_the_first_token_marks_the_item() -> None:
    """A new brick: the same as a text with the backbone's first token where items are."""
    backbone, brick = tiny("llama"), gated(new=True)
    ids = torch.tensor([[5, -2, 9, -2, 7], [4, 3, 8, 6, 2]])
    inputs = {"attention_mask": torch.ones_like(ids)}
    token = backbone.tokenizer.eos_token_id
    plain = bare(backbone, {**inputs, "input_ids": ids.masked_fill(ids == -2, token)})
    with backbone.slots.plugged([brick]), torch.inference_mode():
        backbone.slots.take(given("image", features([[2, 3], []])))
        assert torch.equal(answers(backbone, {**inputs, "input_ids": ids}), plain)
    assert not any(float(b.gate) or float(b.gate_f) for b in brick.connector.blocks)


@contextmanager
def by_hand(brick: Modality, latents: list[Tensor], before: list[int]) -> Iterator[None]:
    """Hooks on transformers' layers: each token of one row by itself, one head after the other."""
    connector, removed = brick.connector, []
    model = tiny("llama").model

    def behind(block: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        rows = []
        for t, x in enumerate(h[0]):
            if before[t]:
                v = block.norm_v(torch.cat(latents[: before[t]]))
                k, w = block.kv(v).chunk(2, dim=-1)
                q = block.q(block.norm_h(x))
                size = q.shape[-1] // block.heads
                heads = []
                for i in range(0, q.shape[-1], size):
                    share = (k[:, i : i + size] @ q[i : i + size] / size**0.5).softmax(0)
                    heads.append(share @ w[:, i : i + size])
                x = x + torch.tanh(block.gate) * block.o(torch.cat(heads))
                inside = F.gelu(block.up(block.norm_f(x)))
                x = x + torch.tanh(block.gate_f) * block.down(inside)
            rows.append(x)
        new = torch.stack(rows)[None]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    for name, block in zip(connector.names, connector.blocks, strict=True):
        layer = model.model.layers[int(name.split(".")[1])]
        hook = lambda m, a, output, block=block: behind(block, output)  # noqa: E731
        removed.append(layer.register_forward_hook(hook))
    try:
        yield
    finally:
        for one in removed:
            one.remove()


@pytest.mark.parametrize("tags", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_tokens_look_at_the_items_before_them(every: int, tags: bool) -> None:
    backbone, brick = tiny("llama"), gated(tags=tags, every=every)
    assert len(brick.connector.names) == 2 // every
    (items,) = features([[3, 1]])
    ids, mask = ids_of(brick, [5, 4, items[0], 9, items[1], 7], 4 + 2 * brick.count(1))
    assert bool(mask.all()) and brick.count(3) == (3 if tags else 1)
    embed, size = backbone.model.get_input_embeddings(), brick.count(1)
    begin, end = brick.tags if tags else (torch.empty(0), torch.empty(0))
    mark = [begin, brick.connector.mark, end] if tags else [brick.connector.mark]
    rows = [*embed(torch.tensor([5, 4])), *mark, embed(torch.tensor(9)), *mark]
    whole = torch.stack([*rows, embed(torch.tensor(7))])[None]
    before = [0, 0] + [1] * (size + 1) + [2] * (size + 1)
    mean, deviation = brick.get_buffer("mean"), brick.get_buffer("deviation")
    with torch.inference_mode():
        v = [(torch.tensor(item) - mean) / deviation for item in items]
        resampler = brick.connector.resampler
        latents = [resampler(x[None], torch.ones(1, len(x)).bool())[0][0] for x in v]
        with by_hand(brick, latents, before):
            expected = backbone.model(inputs_embeds=whole, use_cache=False).logits
        with backbone.slots.plugged([brick]):
            backbone.slots.take(given("image", [items]))
            found = backbone.logits(input_ids=ids[None])
        text = backbone.logits(input_ids=ids[None, :2])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, :2], text, atol=1e-5, rtol=0)


@pytest.mark.parametrize("knowledge", ["prefix", "soft_prompt"])
def test_rows_of_a_mixed_batch_are_their_own(knowledge: str) -> None:
    """Rows with items, without, and without the brick; beside a LoRA and virtual tokens."""
    backbone, eyes = tiny("llama"), gated()
    torch.manual_seed(3)
    lora, front = (make_brick(section(k)).build(backbone).eval() for k in ("lora", knowledge))
    randomise(lora)
    randomise(front)
    rows = features([[2], [], [1, 3], [], [2]])
    weights = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 1], [0, 0, 0], [1, 0, 1]]).float()
    pairs = [ids_of(eyes, [4, *items, 6, 8], 8) for items in rows]
    ids, mask = torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
    with torch.inference_mode():
        with backbone.slots.plugged([lora, front, eyes], list(weights.T)):
            backbone.slots.take(given("image", rows))
            mixed = backbone.logits(input_ids=ids, attention_mask=mask)
        for i, row in enumerate(rows):
            bricks = [b for b, on in zip((lora, front, eyes), weights[i], strict=True) if on]
            length = int(mask[i].sum())
            with backbone.slots.plugged(bricks if row else bricks[:2]):
                backbone.slots.take(given("image", [row]))
                solo = backbone.logits(input_ids=ids[i : i + 1, :length])
            torch.testing.assert_close(mixed[i, :length], solo[0], atol=1e-5, rtol=0)
        with backbone.slots.plugged([eyes]):
            backbone.slots.take(given("image", rows))
            seen = backbone.logits(input_ids=ids, attention_mask=mask)
        text = ids.masked_fill(ids == eyes.sentinel, 0)
        plain = backbone.logits(input_ids=text, attention_mask=mask)
    assert torch.equal(seen[1], plain[1]) and torch.equal(seen[3], plain[3])
    assert not torch.allclose(seen[0], plain[0])


def test_a_cache_keeps_what_was_looked_at() -> None:
    """Token by token, several for each row, and classes behind a prompt: as whole texts."""
    backbone, brick = tiny("llama"), gated()
    rows = features([[2], [3]])
    prompts = [[4, -2, 6], [5, -2, 7]]
    classes = [[10, 1], [11, 12, 1]]

    def whole(i: int, row: list[int]) -> Tensor:
        backbone.slots.take(given("image", [rows[i]]))
        return backbone.logits(input_ids=torch.tensor([row]))[0].double().log_softmax(-1)

    with backbone.slots.plugged([brick]), torch.inference_mode():
        found = class_scores(backbone, prompts, classes, given("image", rows), "sum")
        for i, prompt in enumerate(prompts):
            for j, name in enumerate(classes):
                told = whole(i, prompt + name)[len(prompt) - 1 : -1]
                expected = sum(float(told[k, token]) for k, token in enumerate(name))
                assert found[i, j] == pytest.approx(expected, abs=1e-4)
        said = []
        for cached in (True, False):
            backbone.slots.take(given("image", rows))
            said.append(
                backbone.model.generate(
                    input_ids=torch.tensor(prompts),
                    attention_mask=torch.ones(2, 3).long(),
                    max_new_tokens=4,
                    min_new_tokens=4,
                    num_beams=2,
                    num_return_sequences=2,
                    do_sample=False,
                    use_cache=cached,
                )
            )
        assert torch.equal(*said)
        text = torch.tensor([[4, 9, 6]])
        assert torch.equal(backbone.logits(input_ids=text), bare(backbone, {"input_ids": text}))


def test_a_number_that_chooses_no_layer_is_refused() -> None:
    with pytest.raises(UserError, match=r"connector\.every=3 chooses no layer of the 2"):
        gated(every=3)


def test_items_of_the_batch_before_are_forgotten() -> None:
    backbone, brick = tiny("llama"), gated()
    ids = torch.tensor([[4, 9, 6]])
    with backbone.slots.plugged([brick]), torch.inference_mode():
        backbone.slots.take(given("image", features([[2]])))
        backbone.logits(input_ids=torch.tensor([[4, -2, 6]]))
        backbone.slots.take({})
        assert torch.equal(backbone.logits(input_ids=ids), bare(backbone, {"input_ids": ids}))
    assert np.isfinite(brick.connector.mark.detach().numpy()).all()
