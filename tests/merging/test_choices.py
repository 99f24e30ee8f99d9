"""Weights by depth and site by value; choices that are refused; what a cut says of itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cfm_train.config.merging import check_together, complete
from cfm_train.errors import UserError
from cfm_train.merging import engine
from tests.backbones import batch, randomise, tiny
from tests.brick_laws import plugged
from tests.merging.merges import ONE, TWO, combined, make, merged, mix, relative, updates
from tests.peft_tuners import make as small_tuner
from tests.peft_tuners import tuners

SITES = {"rank": 3, "sites": ["attn.q", "ffn.down"]}


@pytest.mark.parametrize("space", ["delta", "core", "knots"])
@pytest.mark.parametrize("rule", ["linear", "ties/mergekit"])
def test_weights_over_depth_and_by_site(rule: str, space: str) -> None:
    """Layer 0 is at depth 0, layer 1 at depth 1; a filter replaces both, ``normalize`` divides."""
    bricks = [make("bert", SITES, seed) for seed in (1, 2)]
    given: dict[str, Any] = {"space": space, "density": 1.0} if "ties" in rule else {"space": space}
    given |= {"filters": [["ffn.*", 3, 1]], "normalize": True, "rank": 64}
    found = updates(merged(rule, bricks, [[1, 0], [1, 4]], tiny("bert"), **given).brick)
    shares = {"layer.0.attn.q": (0.5, 0.5), "layer.1.attn.q": (0.0, 1.0)}
    for site, update in found.items():
        each = shares.get(site, (0.75, 0.25))
        if rule == "linear":
            parts = [w * updates(b)[site] for w, b in zip(each, bricks, strict=True)]
            assert relative(update, parts[0] + parts[1]) < 1e-6
        else:
            plain = {k: v for k, v in given.items() if k not in ("filters", "normalize")}
            alone = merged(rule, bricks, list(each), tiny("bert"), **plain).brick
            assert relative(update, updates(alone)[site]) < 1e-6


def test_equal_weights_are_the_rules_own() -> None:
    bricks = [make("bert", SITES, seed) for seed in (1, 2)]
    halves = updates(merged("linear", bricks, None, tiny("bert")).brick)
    ones = updates(merged("task_arithmetic", bricks, None, tiny("bert"), scale=0.5).brick)
    for site, update in halves.items():
        assert relative(update, ones[site]) < 1e-6


@pytest.mark.parametrize(
    ("rule", "weights", "given", "sentence"),
    [
        ("linear", None, {"filters": [["atn.*", 1, 2]]}, r"'atn\.\*' matches nothing that the"),
        ("linear", None, {"filters": [["q", 1, 2], ["attn.q", 1, 2]]}, "make the patterns exclude"),
        ("magmax", None, {"filters": [["attn.*", 1, 2]]}, r"leave merge\.filters at null"),
        ("wudi", [1, 2], {"equal": "one"}, r"leave merge\.equal at null"),
        ("sce", [1, 2], {}, "rule=sce takes no weights"),
        ("linear", None, {"space": "parameters", "rank": 4}, r"leave merge\.rank out, or use"),
        ("linear", None, {"space": "cat", "rank": 4}, r"leave merge\.rank out, or use"),
        ("ties", None, {"space": "cat"}, "goes with rule=linear or"),
        ("tsv", None, {"space": "knots"}, "keeps the largest singular values"),
        ("iso_cts", None, {"space": "knots"}, "keeps the largest singular values"),
        ("wudi", None, {"scope": "layer"}, r"use merge\.scope=tensor"),
        ("linear", None, {"scope": "brick", "sparsify": "della"}, r"use merge\.scope=tensor"),
        ("karcher", [1, -2], {}, "rule=karcher takes weights of 0 and more"),
        ("slerp", [1, -1], {}, "add up to zero"),
        ("slerp", [[1, 0], [1, 1]], {"scope": "brick"}, "the rule takes one weight for each"),
        ("linear", [1, -1], {"normalize": True}, "add up to zero"),
        ("linear", [1, float("nan")], {}, "no finite number"),
        ("linear", [1], {}, "has 1 numbers for 2 bricks"),
        ("fisher", None, {}, "needs fisher statistics of every brick"),
    ],
)
def test_one_sentence(rule: str, weights: Any, given: dict[str, Any], sentence: str) -> None:
    bricks = [make("bert", ONE, seed) for seed in (1, 2)]
    with pytest.raises(UserError, match=sentence) as caught:
        merged(rule, bricks, weights, tiny("bert"), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "given"),
    [
        ("ties", {"space": "cat"}),
        ("linear", {"space": "cat", "rank": 4}),
        ("linear", {"space": "parameters", "rank": 4}),
        ("tsv", {"space": "knots"}),
        ("regmean", {"scope": "brick"}),
        ("linear", {"scope": "brick", "sparsify": "della"}),
    ],
)
def test_the_same_before_anything_is_loaded(rule: str, given: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        check_together(complete(rule, given), low_rank=True)
    with pytest.raises(UserError, match=r"leave merge\.rank out\.$"):
        check_together(complete("linear", {"rank": 2}), low_rank=False)
    check_together(complete("linear", {"rank": 2}), low_rank=True)
    check_together(complete("linear", {"space": "cat", "scope": "brick"}), low_rank=True)


def test_a_weight_and_a_part_of_it() -> None:
    """Sites that share rows: a sum may take them one by one, a rule that compares may not."""
    backbone = tiny("gpt2")
    whole = next(
        name for name, site in backbone.sites.items()
        if site.rows is None and site.module == backbone.sites["layer.0.attn.q"].module
    )  # fmt: skip
    one = make("gpt2", {"rank": 2, "sites": [whole]}, 1)
    two = make("gpt2", {"rank": 2, "sites": ["attn.q"], "layers": [0]}, 2)
    both = updates(merged("linear", [one, two], [0.5, 2.0], backbone).brick)
    assert relative(both[whole], 0.5 * updates(one)[whole]) < 1e-6
    for rule, given in (("ties", {}), ("linear", {"sparsify": "tall"}), ("wudi", {})):
        with pytest.raises(UserError, match="share rows of one weight"):
            merged(rule, [one, two], None, backbone, **given)


@pytest.mark.parametrize("space", ["delta", "core", "knots", "parameters"])
@pytest.mark.parametrize("rule", ["linear", "ties", "karcher", "tsv", "iso_c", "wudi", "sce"])
def test_bricks_that_change_nothing(rule: str, space: str) -> None:
    """New bricks, whose B is zero, one of them or all."""
    if (rule, space) == ("tsv", "knots"):
        return
    new, other = make("bert", ONE, 1), make("bert", ONE, 2)
    with torch.no_grad():
        for value in new.lora_B.values():  # type: ignore[union-attr]
            value.zero_()
    found = merged(rule, [new, new], None, tiny("bert"), space=space).brick
    assert not any(update.any() for update in updates(found).values())
    found = merged(rule, [new, other], None, tiny("bert"), space=space).brick
    assert all(update.isfinite().all() and update.any() for update in updates(found).values())


@pytest.mark.parametrize("space", ["delta", "core", "knots"])
@pytest.mark.parametrize("rule", ["ties/mergekit", "wudi", "iso_c", "magmax"])
def test_a_brick_and_a_copy_of_it(rule: str, space: str) -> None:
    """Factors that depend on each other: directions that are rounding do not count."""
    brick, other = make("bert", ONE, 1), make("bert", TWO, 2)
    copied = merged("linear", [brick], [1.0], tiny("bert"), rank=2).brick
    twice = merged(rule, [brick, copied, other], None, tiny("bert"), space=space, rank=64, scale=1)
    same = merged(rule, [brick, brick, other], None, tiny("bert"), space=space, rank=64, scale=1)
    for site, update in updates(twice.brick).items():
        assert relative(update, updates(same.brick)[site]) < 1e-4


def test_what_a_cut_leaves_out_is_told_even_if_no_rank_was_asked_for() -> None:
    bricks = [make("bert", ONE, seed) for seed in (1, 2)]
    backbone = tiny("bert")
    result = merged("ties", bricks, None, backbone)
    whole = merged("ties", bricks, None, backbone, rank=64)
    assert whole.lost == 0.0 and result.lost is not None
    lost = max(
        relative(updates(result.brick)[site], update)
        for site, update in updates(whole.brick).items()
    )
    assert result.lost == pytest.approx(lost, rel=1e-3) and lost > 0.05
    assert merged("linear", bricks, None, backbone).lost is None
    assert merged("multislerp", bricks, None, backbone).lost is None


def test_opposite_rows_are_on_a_line() -> None:
    """Of exactly opposite vectors the sine is 1e-16 and no zero."""
    one = torch.zeros(3, 4, dtype=torch.float64)
    one[0, 1], one[1, 2], one[2, 0] = 2.0, -3.0, 0.1
    two = -one * torch.tensor([[1.0], [2.0], [0.5]])
    for rule, given in (("nuslerp", {}), ("nuslerp", {"along": "all"}), ("slerp", {})):
        X = torch.stack([one[:1], two[:1]]) if given or rule == "slerp" else torch.stack([one, two])
        found = combined(rule, X, [0.25, 0.75], **given)
        assert relative(found, 0.25 * X[0] + 0.75 * X[1]) < 1e-12


def test_statistics_rules_sparsify_biases_too() -> None:
    backbone = tiny("bert")
    bricks = [make("bert", {**ONE, "bias": "lora_bias"}, seed) for seed in (1, 2)]

    def ones(site: str) -> list[torch.Tensor]:
        place = backbone.sites[site]
        return [torch.ones(place.out_features, place.in_features)] * 2

    chosen = mix("fisher", sparsify="magnitude", density=0.25)
    brick = engine.merge(bricks, [1, 1], chosen, backbone, statistics=ones).brick
    plain = merged("linear", bricks, [0.5, 0.5], backbone, sparsify="magnitude", density=0.25).brick
    for key, bias in plain.bias.items():  # type: ignore[union-attr]
        assert relative(brick.bias[key].detach(), bias.detach()) < 1e-6  # type: ignore[index]


@pytest.mark.parametrize("tuner", [name for name in tuners() if name != "p_tuning"])
def test_tuners_of_peft_are_measured_from_where_they_do_nothing_or_averaged(tuner: str) -> None:
    backbone = tiny("bert")
    inputs = batch(backbone)
    bare = plugged(backbone, [], inputs)
    bricks = [small_tuner(tuner, backbone) for _ in range(2)]
    for seed, brick in enumerate(bricks):
        randomise(brick.eval(), seed, 0.2)
    alone = plugged(backbone, bricks[:1], inputs)
    same = merged("linear", bricks[:1] * 2, [0.3, 0.7], backbone).brick
    torch.testing.assert_close(plugged(backbone, [same], inputs), alone, atol=1e-5, rtol=1e-5)
    try:
        nothing = merged("linear", bricks, None, backbone, scale=0.0).brick
    except UserError as refused:
        assert "they have no updates" in str(refused)
        for rule in ("ties", "task_arithmetic", "linear"):
            with pytest.raises(UserError, match="they have no updates"):
                merged(rule, bricks, [0.5, 0.6], backbone)
        return
    torch.testing.assert_close(plugged(backbone, [nothing], inputs), bare, atol=1e-5, rtol=1e-5)


def test_a_prompt_with_its_network_and_without() -> None:
    backbone = tiny("bert")
    brick = make("bert", {}, 1, "p_tuning")
    inputs = batch(backbone)
    found = merged("linear", [brick], [1.0], backbone).brick
    assert torch.equal(plugged(backbone, [found], inputs), plugged(backbone, [brick], inputs))
