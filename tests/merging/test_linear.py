"""Linear merging against the float64 sum of the parents' updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.heads import Head
from cfm_train.bricks.lora import LoRA
from cfm_train.errors import UserError
from cfm_train.merging.invariants import try_promises
from tests.backbones import FAMILIES, batch, tiny
from tests.brick_laws import plugged
from tests.merging.merges import ONE, THREE, TWO, make, merged, mix, updates


def merge(parents: Sequence[Brick], weights: object, backbone: Backbone) -> Brick:
    return merged("linear", parents, weights, backbone).brick


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sum_of_the_updates(family: str) -> None:
    parents = [make(family, h, s) for s, h in enumerate((ONE, TWO, THREE))]
    weights = [0.3, -1.5, 0.8]
    both = merge(parents, weights, tiny(family))
    expected: dict[str, torch.Tensor] = {}
    for parent, weight in zip(parents, weights, strict=True):
        for site, update in updates(parent).items():
            expected[site] = expected.get(site, 0) + weight * update
    found = updates(both)
    assert found.keys() == expected.keys()
    for site, update in expected.items():
        assert (found[site] - update).norm() <= 1e-6 * update.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_its_laws_on_the_answers(family: str) -> None:
    backbone = tiny(family)
    inputs = batch(backbone)
    one, two, three = parents = [make(family, h, s) for s, h in enumerate((ONE, TWO, THREE))]
    alone = plugged(backbone, [one], inputs)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(
        plugged(backbone, [merge(parents, [1, 0, 0], backbone)], inputs), alone, **close
    )
    cancelled = merge([one, one], [0.7, -0.7], backbone)
    torch.testing.assert_close(
        plugged(backbone, [cancelled], inputs), plugged(backbone, [], inputs), **close
    )
    forth = plugged(backbone, [merge(parents, [0.2, 0.3, 0.5], backbone)], inputs)
    back = plugged(backbone, [merge([three, one, two], [0.5, 0.2, 0.3], backbone)], inputs)
    torch.testing.assert_close(forth, back, **close)
    # The bank weighs bricks that are plugged together in another way: the same sum.
    together = plugged(backbone, parents, inputs, [0.2, 0.3, 0.5])
    torch.testing.assert_close(forth, together, **close)
    checks = try_promises(parents, None, mix("linear"), backbone, sources=["1", "2", "3"])
    assert len(checks) == 5
    for check in checks.values():
        assert check["passed"] and 0 <= check["value"] <= 1e-4


@pytest.mark.parametrize("bias", ["lora_bias", "lora_only"])
def test_biases_are_summed(bias: str) -> None:
    backbone = tiny("bert")
    inputs = batch(backbone)
    parents = [make("bert", {**ONE, "bias": bias}, 1), make("bert", ONE, 2)]
    both = merge(parents, [0.4, 0.6], backbone)
    together = plugged(backbone, parents, inputs, [0.4, 0.6])
    torch.testing.assert_close(plugged(backbone, [both], inputs), together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_goes_through_the_library_format(family: str) -> None:
    backbone = tiny(family)
    inputs = batch(backbone)
    both = merge([make(family, ONE, 1), make(family, TWO, 2)], [0.5, 0.5], backbone)
    again = LoRA.restore(both.interface(), both.body_files(), backbone).eval()
    torch.testing.assert_close(
        plugged(backbone, [again], inputs), plugged(backbone, [both], inputs), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("kind", "hyper"),
    [
        ("ia3", {}),
        ("pfeiffer", {}),
        ("soft_prompt", {}),
        ("prefix", {}),
        ("bitfit", {}),
        ("loha", {}),
    ],
)
def test_other_kinds_average_their_parameters(kind: str, hyper: dict[str, Any]) -> None:
    backbone = tiny("bert")
    one, two = (make("bert", hyper, seed, kind) for seed in (1, 2))
    both = merge([one, two], [0.25, 0.75], backbone)
    state = both.state_dict()
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(state[name], (0.25 * a.double() + 0.75 * b.double()).float())
    inputs = batch(backbone)
    alone = merge([one, two], [1, 0], backbone)
    assert torch.equal(plugged(backbone, [alone], inputs), plugged(backbone, [one], inputs))


@pytest.mark.parametrize(
    ("bricks", "sentence"),
    [
        ([("lora", {}), ("ia3", {})], "Bricks of the kinds lora and ia3 have different parameters"),
        ([("dora", {}), ("lora", {})], "differ in brick.dora"),
        ([("ia3", {"layers": [0]}), ("ia3", {"layers": [1]})], "differ in their sites or shapes"),
        ([("pfeiffer", {}), ("pfeiffer", {"bottleneck": 3})], "differ in"),
        ([("pfeiffer", {}), ("pfeiffer", {"activation": "tanh"})], "differ in brick.activation"),
    ],
)
def test_what_cannot_be_averaged(bricks: list[Any], sentence: str) -> None:
    made = [make("bert", hyper, 1, kind) for kind, hyper in bricks]
    with pytest.raises(UserError, match=sentence):
        merge(made, [0.5, 0.5], tiny("bert"))


def test_heads_of_all_parents_are_carried() -> None:
    backbone = tiny("bert")
    one, two, three = (make("bert", ONE, seed) for seed in (1, 2, 3))
    heads = [Head("classification", ["x", "y"], 32, "mean") for _ in range(3)]
    one.add_head("a.1", heads[0])
    two.add_head("train", heads[1])
    three.add_head("a.1", heads[2])
    both = merge([one, two], [0.5, 0.5], backbone)
    assert set(both.heads) == {"a.1", "train"}
    assert both.head_for("a.1") is heads[0] and both.head_for("train") is heads[1]
    assert set(merge([both, one], [0.5, 0.5], backbone).heads) == {"a.1", "train"}
    with pytest.raises(UserError, match=r"different heads for 'a\.1'"):
        merge([both, three], [0.5, 0.5], backbone)
