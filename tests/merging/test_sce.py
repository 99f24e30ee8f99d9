"""SCE against mergekit and a loop over numbers."""

from __future__ import annotations

import pytest
import torch

from cfm_train.errors import UserError
from tests.merging.merges import combined, mergekit, random_updates, relative


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.0])
@pytest.mark.parametrize("shape", [(9,), (4, 6)])
def test_equals_mergekit(share: float, shape: tuple[int, ...]) -> None:
    updates = random_updates(3, *shape)
    theirs = mergekit("sce", updates, select_topk=share)
    found = combined("sce", updates, select_topk=share)
    assert found.any() == bool(share) or int(share * found.numel()) == 0
    torch.testing.assert_close(found, theirs, rtol=1e-6, atol=1e-12)


def test_number_by_number() -> None:
    updates = random_updates(3, 10, seed=4)
    rows = updates.tolist()
    columns = list(zip(*rows, strict=True))
    spread = [sum((x - sum(c) / 3) ** 2 for x in c) / 3 for c in columns]
    stay = sorted(range(10), key=lambda i: -spread[i])[:4]
    kept = [[x if i in stay else 0.0 for i, x in enumerate(row)] for row in rows]
    energy = [sum(x * x for x in row) for row in kept]
    expected = []
    for column in zip(*kept, strict=True):
        plus = sum(column) >= 0
        agree = [(w, x) for w, x in zip(energy, column, strict=True) if x and (x > 0) == plus]
        below = sum(w for w, _ in agree)
        expected.append(sum(w * x for w, x in agree) / below if below else 0.0)
    found = combined("sce", updates, select_topk=0.4)
    assert relative(found, torch.tensor(expected, dtype=torch.float64)) < 1e-12


def test_weights_come_from_the_updates_however_small_they_are() -> None:
    updates = random_updates(3, 12)
    small = combined("sce", updates * 1e-5)
    assert relative(small * 1e5, combined("sce", updates)) < 1e-12
    with pytest.raises(UserError, match="rule=sce takes no weights"):
        combined("sce", updates, [1, 1, 1])
    assert not combined("sce", torch.zeros(2, 4)).any()
