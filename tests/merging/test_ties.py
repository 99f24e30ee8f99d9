"""TIES in all its variants against a loop over numbers in Python, and against mergekit and PEFT."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.merging.merges import combined, mergekit, random_updates, relative


def by_number(column: list[float], weights: list[float], elect: str, divisor: str) -> float:
    """One number of the result, by the definitions."""
    sign = [(x > 0) - (x < 0) for x in column]
    votes = {
        "total": sum(column),
        "weighted": sum(w * x for w, x in zip(weights, column, strict=True)),
        "frequency": sum(sign),
    }[elect]
    if elect == "weighted":
        sign = [(w * x > 0) - (w * x < 0) for w, x in zip(weights, column, strict=True)]
    elected = 1 if votes >= 0 else -1
    agree = [n for n, one in enumerate(sign) if one == elected]
    total = sum(weights[n] * column[n] for n in agree)
    parts = {"one": 1, "count": len(agree), "weights": sum(weights[n] for n in agree)}[divisor]
    return total / parts if parts else total


@pytest.mark.parametrize(
    ("elect", "divisor"),
    itertools.product(("total", "weighted", "frequency"), ("count", "weights", "one")),
)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -0.3, 1.2]])
def test_every_choice_by_its_definition(elect: str, divisor: str, weights: list[float]) -> None:
    updates = random_updates(3, 5, 7)
    updates[:, 0, :3] = 0
    updates[1:, 1] = 0
    found = combined("ties", updates, weights, elect=elect, divisor=divisor, density=1.0)
    for place in itertools.product(range(5), range(7)):
        column = updates[(slice(None), *place)].tolist()
        expected = by_number(column, weights, elect, divisor)
        assert found[place].item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_weights_that_differ_within_a_group() -> None:
    updates = random_updates(2, 6)
    weights = random_updates(2, 6, seed=3).abs()
    from cfm_train.merging.rule import Facts
    from cfm_train.merging.ties import Ties

    found = Ties("weighted", "weights").combine(updates, weights, Facts(""))
    for n in range(6):
        expected = by_number(updates[:, n].tolist(), weights[:, n].tolist(), "weighted", "weights")
        assert found[n].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_mergekit(density: float) -> None:
    updates = random_updates(3, 8, 9).float()
    weights = [0.5, 0.3, 0.2]
    found = combined("ties/mergekit", updates, weights, density=density)
    theirs = mergekit("ties", updates, weights, density=density, normalize=True)
    assert relative(found, theirs) < 1e-6


@pytest.mark.parametrize("density", [1.0, 0.25])
def test_peft(density: float) -> None:
    """PEFT's function on one tensor: unweighted election, weights after it, divided by how many."""
    from peft.utils.merge_utils import ties

    updates = random_updates(3, 8, 8).float()
    weights = [0.5, 0.3, 0.2]
    found = combined("ties", updates, weights, density=density, scope="tensor")
    theirs = ties(list(updates), torch.tensor(weights), density, "total")
    assert relative(found, theirs) < 1e-6
