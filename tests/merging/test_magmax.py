"""MagMax against a loop over numbers."""

from __future__ import annotations

import pytest
import torch

from cfm_train.errors import UserError
from tests.merging.merges import combined, random_updates


def test_the_largest_number_wins() -> None:
    updates = random_updates(4, 3, 5)
    expected = torch.zeros(3, 5).double()
    for row in range(3):
        for column in range(5):
            expected[row, column] = max(updates[:, row, column].tolist(), key=abs)
    assert torch.equal(combined("magmax", updates), 0.5 * expected)
    assert torch.equal(combined("magmax", updates, scale=1.0), expected)


def test_opposite_numbers_do_not_depend_on_the_order() -> None:
    updates = torch.tensor([[2.0, -2.0, 0.0], [-2.0, 2.0, 0.0]])
    for order in ([0, 1], [1, 0]):
        found = combined("magmax", updates[order], scale=1.0)
        assert found.tolist() == [2.0, 2.0, 0.0]


def test_it_takes_no_weights() -> None:
    with pytest.raises(UserError, match="rule=magmax takes no weights"):
        combined("magmax", random_updates(2, 3), [1, 2])
