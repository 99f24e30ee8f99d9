"""mergekit's named methods as ours: which rule, sparsifier and arguments each of them is.

Ours differ where these tests give an argument: mergekit's DARE and DELLA keep the L1 norm where the
papers divide by the probability, and only its ``ties`` divides by the weights that agree.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cfm_train import paths
from cfm_train.config.compose import compose
from cfm_train.merging.sparsify.sparsifier import generator
from tests.merging.merges import combined, mergekit, random_updates, relative

WEIGHTS = [0.6, 0.3, 1.1]
SIGNED = [0.6, -0.3, 1.1]

#: mergekit's method and parameters, our rule and arguments.
NAMED: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("task_arithmetic", {"lambda": 0.3}, "task_arithmetic", {}),
    ("task_arithmetic", {"normalize": True}, "linear", {"normalize": True}),
    ("ties", {"density": 0.3}, "ties/mergekit", {"density": 0.3}),
    ("ties", {"density": 0.3, "lambda": 0.7}, "ties/mergekit", {"density": 0.3, "scale": 0.7}),
    (
        "ties",
        {"density": 0.3, "normalize": False},
        "ties/mergekit",
        {"density": 0.3, "divisor": "one"},
    ),
    (
        "dare_ties",
        {"density": 0.4},
        "ties/mergekit",
        {"sparsify": "dare", "density": 0.4, "rescale": "l1", "divisor": "one"},
    ),
    (
        "dare_ties",
        {"density": 0.4, "normalize": True},
        "ties/mergekit",
        {"sparsify": "dare", "density": 0.4, "rescale": "l1"},
    ),
    (
        "dare_linear",
        {"density": 0.4},
        "linear",
        {"sparsify": "dare", "density": 0.4, "rescale": "l1"},
    ),
    (
        "della",
        {"density": 0.5, "epsilon": 0.2},
        "ties/mergekit",
        {"sparsify": "della", "density": 0.5, "epsilon": 0.2, "rescale": "l1"},
    ),
    (
        "della_linear",
        {"density": 0.5, "epsilon": 0.2},
        "linear",
        {"sparsify": "della", "density": 0.5, "epsilon": 0.2, "rescale": "l1"},
    ),
    (
        "breadcrumbs",
        {"density": 0.5, "gamma": 0.1},
        "linear",
        {"sparsify": "breadcrumbs", "density": 0.5, "gamma": 0.1},
    ),
    (
        "breadcrumbs_ties",
        {"density": 0.5, "gamma": 0.1},
        "ties/mergekit",
        {"sparsify": "breadcrumbs", "density": 0.5, "gamma": 0.1, "divisor": "one"},
    ),
]


@pytest.mark.parametrize(("method", "theirs", "rule", "ours"), NAMED)
@pytest.mark.parametrize("shape", [(41,), (8, 12)])
def test_equals_mergekit(
    method: str,
    theirs: dict[str, Any],
    rule: str,
    ours: dict[str, Any],
    shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    updates = random_updates(3, *shape)
    for weights in (WEIGHTS, SIGNED):
        monkeypatch.setattr(torch, "bernoulli", same_draws(shape))
        if "della" in method or "dare" in method:
            # Their default differs between methods; with it on, it is the L1 norm.
            theirs = {**theirs, "rescale": True}
        if method == "della":
            theirs = {"normalize": True, **theirs}
        if method == "breadcrumbs_ties":
            theirs = {"normalize": False, **theirs}
        expected = mergekit(method, updates, weights, **theirs)
        assert relative(combined(rule, updates, weights, **ours), expected) < 1e-5


#: Our recipe of the same name with these overrides is mergekit's method with its own defaults.
RECIPES = {
    "dare_ties": ["merge.divisor=one", "merge.rescale=l1"],
    "breadcrumbs_ties": ["merge.divisor=one"],
    "della": ["merge.rescale=l1", "merge.epsilon=0.15"],
}


@pytest.mark.parametrize("method", RECIPES)
def test_recipes_with_the_overrides_that_are_documented(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit is given weights and density alone; without the overrides ours differ."""
    updates = random_updates(3, 8, 12)
    recipe = [f"recipe=merge/{method}", "name=x", "bricks=[a,b,c]", "merge.density=0.5"]

    def ours(*overrides: str) -> torch.Tensor:
        given = {**compose([*recipe, *overrides])["merge"], "seed": 0}
        return combined(given.pop("rule"), updates, WEIGHTS, **given)

    monkeypatch.setattr(torch, "bernoulli", same_draws((8, 12)))
    theirs = mergekit(method, updates, WEIGHTS, density=0.5)
    assert relative(ours(*RECIPES[method]), theirs) < 1e-5
    assert relative(ours(), theirs) > 0.1
    documented = (paths.ROOT / "docs" / "merging.md").read_text()
    if "merge.divisor=one" in RECIPES[method]:
        documented = (paths.ROOT / "recipes" / "merge" / f"{method}.yaml").read_text()
    assert all(override in documented for override in RECIPES[method])


def same_draws(shape: tuple[int, ...]) -> Any:
    """``torch.bernoulli`` on the numbers that ours are drawn from, one input after the other."""
    left = [
        torch.rand(shape, generator=generator(0, "entry", f"brick-{number}")) for number in range(3)
    ]

    def draw(chances: torch.Tensor, **_: Any) -> torch.Tensor:
        return (left.pop(0).view(chances.shape) < chances).to(chances.dtype)

    return draw


@pytest.mark.parametrize("normalize", [True, False])
def test_linear(normalize: bool) -> None:
    from mergekit.merge_methods.api import merge_tensors

    updates = random_updates(3, 6, 5)
    theirs = merge_tensors(
        list(updates),
        "linear",
        parameters={"weight": dict(zip("abc", WEIGHTS, strict=True)), "normalize": normalize},
        ids=list("abc"),
    )
    assert relative(combined("linear", updates, WEIGHTS, normalize=normalize), theirs) < 1e-6
