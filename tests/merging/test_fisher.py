"""Fisher merging against a loop over numbers."""

from __future__ import annotations

import pytest
import torch

from cfm_train.errors import UserError
from tests.merging.merges import combined, random_updates, relative


def test_the_formula_number_by_number() -> None:
    updates = random_updates(3, 4, 5)
    diagonals = random_updates(3, 4, 5, seed=1).square()
    diagonals[:, 0, 0] = 0
    weights = [0.5, 0.3, 1.2]
    expected = torch.zeros(4, 5).double()
    for row in range(4):
        for column in range(5):
            sure = [
                w * max(float(f[row, column]), 1e-3)
                for w, f in zip(weights, diagonals, strict=True)
            ]
            numbers = [float(one[row, column]) for one in updates]
            above = sum(s * x for s, x in zip(sure, numbers, strict=True))
            expected[row, column] = above / sum(sure)
    found = combined("fisher", updates, weights, statistics=list(diagonals), minimum=1e-3)
    assert relative(found, expected) < 1e-12
    # Nothing is known of the first number: the weights alone decide.
    assert float(found[0, 0]) == pytest.approx(
        sum(w * float(x[0, 0]) for w, x in zip(weights, updates, strict=True)) / sum(weights)
    )


def test_equal_information_is_the_average() -> None:
    updates = random_updates(3, 4, 5)
    same = [torch.full((4, 5), 7.0)] * 3
    found = combined("fisher", updates, [1, 2, 3], statistics=same)
    expected = (updates * torch.tensor([1, 2, 3]).view(3, 1, 1) / 6).sum(0)
    assert relative(found, expected) < 1e-7


@pytest.mark.parametrize(
    ("weights", "shape", "sentence"),
    [
        ([1, -1], (4, 5), "rule=fisher takes weights of 0 and more"),
        ([0, 0], (4, 5), "rule=fisher takes weights of 0 and more"),
        ([1, 1], (5, 4), r"of 'entry' has the shape \[5, 4\], and its update \[4, 5\]"),
    ],
)
def test_what_makes_no_average(weights: list[float], shape: tuple[int, ...], sentence: str) -> None:
    diagonals = [torch.ones(shape)] * 2
    with pytest.raises(UserError, match=sentence):
        combined("fisher", random_updates(2, 4, 5), weights, statistics=diagonals)
