"""Where stitches could go wrong without a word: scales, ranks, rows, nesting, both kinds of tokens.

Oracles: wrapped modules in float64, PEFT, transformers' own cache, and each row on its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.lora import LoRA
from cfm_train.bricks.prefix import Prefix
from cfm_train.bricks.soft_prompt import SoftPrompt
from cfm_train.config.merging import complete
from cfm_train.configuration.apply import plain
from cfm_train.merging.engine import merge
from cfm_train.merging.mix import make_mix
from cfm_train.stitching.fold import fold
from cfm_train.stitching.promises import promises, random_probe
from cfm_train.stitching.stitch import stitch_bricks
from tests.backbones import FAMILIES, bare, batch, plain_model, tiny
from tests.brick_laws import plugged
from tests.lora_cases import lora
from tests.peft_peers import in_peft, values
from tests.stitching.naive import naive
from tests.stitching.test_modes import adapters, noisy

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SITES = ["attn.q", "attn.o"]


def mixed(backbone: Backbone) -> list[LoRA]:
    """rsLoRA with a bias, LoRA with another rank and alpha at each site, and a plain one."""
    one = noisy(lora(backbone, sites=SITES, rank=4, alpha=7, rslora=True, bias="lora_bias"), 1)
    pattern = LoRA(3, 5, 0.0, SITES, None, False, False, "none")
    pattern.task_type = one.task_type
    for number, name in enumerate(one.site_names):
        site = backbone.sites[name]
        A, B = torch.zeros(1 + number % 3, site.in_features), torch.zeros(site.out_features, 1)
        pattern.add_site(site, A, B.expand(-1, len(A)).clone(), 2.0 + number, None, None)
        pattern.know(backbone, site)
    return [one, noisy(pattern, 2), noisy(lora(backbone, sites=["attn.o"], rank=2), 3)]


@pytest.mark.parametrize("mode", ["chain", "pipe", "sum"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_scales_ranks_and_biases_of_each_site(family: str, mode: str, tmp_path: Path) -> None:
    """By hand, folded, through a file, and in PEFT: one update, five ways."""
    backbone = tiny(family)
    inputs = batch(backbone)
    parts = mixed(backbone)[: 2 if mode == "pipe" else 3]
    stitched = stitch_bricks(mode, parts, backbone)
    found = plugged(backbone, [stitched], inputs)
    torch.testing.assert_close(found, naive(family, backbone, mode, parts, inputs), **CLOSE)
    folded = fold(stitched, backbone)
    again = LoRA.restore({}, folded.body_files(), backbone).eval()
    for one in (folded, again):
        torch.testing.assert_close(plugged(backbone, [one], inputs), found, **CLOSE)
    theirs = values(in_peft(folded, family, tmp_path / "adapter"), inputs)
    torch.testing.assert_close(theirs, found, **CLOSE)


def test_sum_of_rslora_and_rank_patterns_is_peft_s(tmp_path: Path) -> None:
    """``set_adapter([a, b])`` reads both files, each with its own scales."""
    backbone = tiny("bert")
    inputs = batch(backbone)
    parts = mixed(backbone)[:2]
    for name, part in zip("ab", parts, strict=True):
        (tmp_path / name).mkdir()
        for file, content in part.body_files().items():
            (tmp_path / name / file).write_bytes(content)
    model = peft.PeftModel.from_pretrained(plain_model("bert"), tmp_path / "a", "a")
    model.load_adapter(tmp_path / "b", "b")
    model.base_model.set_adapter(["a", "b"])
    found = plugged(backbone, [stitch_bricks("sum", parts, backbone)], inputs)
    torch.testing.assert_close(found, values(model.eval(), inputs), **CLOSE)


def averaged(parts: list[Brick], weights: list[float], backbone: Backbone) -> Brick:
    made = [plain(part, backbone) for part in parts]
    mix = make_mix(complete("linear", {}))
    names = [str(number) for number in range(len(made))]
    merged: Brick = merge(made, weights, mix, backbone, sources=names, statistics=None).brick
    return merged


@pytest.mark.parametrize("mode", ["chain", "pipe"])
def test_a_stitch_of_a_merge_of_stitches(mode: str) -> None:
    """By hand: the inner stitches' updates weighed and added, then stitched to another brick."""
    backbone = tiny("llama")
    inputs = batch(backbone)
    a, b, c = (noisy(lora(backbone, sites=SITES, rank=r), r) for r in (4, 2, 3))
    inner = [stitch_bricks("chain", [a, b], backbone), stitch_bricks("pipe", [b, c], backbone)]
    outer = stitch_bricks(mode, [averaged(list(inner), [0.3, -0.7], backbone), c], backbone)
    found = plugged(backbone, [outer], inputs)
    total = noisy(lora(backbone, sites=SITES, rank=10, alpha=10), 9)
    for name in total.site_names:  # s B A of a chain and of a pipe, from their formulas
        key = name.replace(".", "-")
        A, B = [], []
        for brick in (a, b, c):
            A.append(brick.lora_A[key].detach().double())
            B.append(brick.lora_B[key].detach().double() * brick.alphas[name] / len(A[-1]))
        chained = B[0] @ A[0] + B[1] @ A[1] @ (torch.eye(A[0].shape[1]) + B[0] @ A[0])
        left, s, right = torch.linalg.svd(0.3 * chained - 0.7 * B[2] @ A[2] @ B[1] @ A[1])
        total.lora_A[key].data.copy_(right[:10])
        total.lora_B[key].data.copy_(left[:, :10] * s[:10])
    expected = naive("llama", backbone, mode, [total, c], inputs)
    torch.testing.assert_close(found, expected, **CLOSE)


def tokens(backbone: Backbone, seed: int = 1) -> tuple[SoftPrompt, Prefix]:
    prompt = noisy(SoftPrompt(3, "vocabulary", None).build(backbone), seed)
    prefix = noisy(
        Prefix(2, "vocabulary", None, ["attn"], None, None, "behind").build(backbone), seed + 1
    )
    return prompt, prefix


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prefix_and_a_soft_prompt_as_transformers_cache_has_them(family: str) -> None:
    """The prefix as a cache, the prompt as embeddings before those of the text."""
    backbone = tiny(family)
    ids = batch(backbone, rows=2)["input_ids"][:1]
    prompt, prefix = tokens(backbone)
    model = plain_model(family)
    cache = DynamicCache()
    for number, site in enumerate(prefix.site_names):
        keys, values_ = (part.detach().transpose(0, 1)[None] for part in prefix.states(site))
        cache.update(keys, values_, number)
    embedded = model.get_input_embeddings()(ids)
    embedded = torch.cat([prompt.embeddings.detach()[None], embedded], dim=1)
    with torch.inference_mode():
        expected = model(inputs_embeds=embedded, past_key_values=cache).logits[:, 3:]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for parts in ([prefix, prompt], [prompt, prefix]):
        stitched = stitch_bricks("prompt", parts, backbone)
        assert stitched.virtual_tokens() == 5
        torch.testing.assert_close(plugged(backbone, [stitched], inputs), expected, **CLOSE)
        checks = promises(stitched, random_probe(backbone))
        assert all(check["passed"] for check in checks.values()), checks


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_nest_with_other_kinds(family: str) -> None:
    """Tokens of both kinds and two updates in one stitch: as if all were plugged in."""
    backbone = tiny(family)
    inputs = batch(backbone)
    prompt, prefix = tokens(backbone)
    both = stitch_bricks("prompt", [prompt, prefix], backbone)
    update = noisy(lora(backbone, sites=SITES), 5)
    found = plugged(backbone, [stitch_bricks("chain", [both, update], backbone)], inputs)
    torch.testing.assert_close(found, plugged(backbone, [prefix, prompt, update], inputs), **CLOSE)
    assert (found - plugged(backbone, [prompt, update], inputs)).abs().max() > 1e-4
    more = stitch_bricks("prompt", [both, tokens(backbone, 7)[1]], backbone)
    assert more.virtual_tokens() == 7


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_has_another_stitch(family: str) -> None:
    """Tokens, a chain of adapters, a nested stitch and nothing, each row as alone; then bare."""
    backbone = tiny(family)
    inputs = batch(backbone, rows=4)
    before = bare(backbone, inputs)
    a, b = (noisy(lora(backbone, sites=SITES, rank=rank), rank) for rank in (4, 2))
    nested = averaged([stitch_bricks("pipe", [a, b], backbone), b], [0.5, 0.5], backbone)
    bricks: list[Any] = [
        stitch_bricks("prompt", tokens(backbone), backbone),
        stitch_bricks("chain", adapters(backbone), backbone),
        stitch_bricks("sum", [stitch_bricks("chain", [nested, a], backbone), b], backbone),
    ]
    weights: list[Tensor] = [torch.eye(4)[row] for row in range(3)]
    found = plugged(backbone, bricks, inputs, weights)
    for row, brick in enumerate(bricks):
        real = inputs["attention_mask"][row].bool()
        alone = plugged(backbone, [brick], inputs)
        if family == "t5":  # answers are the decoder's, of another length than the mask
            real = torch.ones(alone.shape[1], dtype=torch.bool)
        torch.testing.assert_close(found[row][real], alone[row][real], atol=1e-5, rtol=0)
        assert (alone[row] - before[row]).abs().max() > 1e-3
    assert torch.equal(bare(backbone, inputs), before)
