"""NuSLERP against mergekit: rows, columns, the whole tensor, vectors."""

from __future__ import annotations

import pytest
import torch

from cfm_train.errors import UserError
from tests.merging.merges import combined, mergekit, random_updates, relative

OPTIONS = {
    "all": {},
    "rows": {"nuslerp_flatten": False},
    "columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
}


@pytest.mark.parametrize("along", OPTIONS)
@pytest.mark.parametrize("shape", [(6,), (4, 6)])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.2, 0.6], [2.0, -0.5]])
def test_equals_mergekit(along: str, shape: tuple[int, ...], weights: list[float]) -> None:
    updates = random_updates(2, *shape)
    theirs = mergekit("nuslerp", updates, weights, **OPTIONS[along])
    assert relative(combined("nuslerp", updates, weights, along=along), theirs) < 1e-6


def test_rows_are_taken_one_by_one() -> None:
    updates = random_updates(2, 4, 6)
    rows = [combined("slerp", updates[:, i], dot_threshold=1.0) for i in range(4)]
    assert relative(combined("nuslerp", updates, along="rows"), torch.stack(rows)) < 1e-12
    whole = combined("nuslerp", updates, along="all")
    assert relative(whole, combined("slerp", updates, dot_threshold=1.0)) < 1e-12


def test_rows_of_zeros_and_equal_rows() -> None:
    updates = random_updates(2, 4, 6)
    updates[1, 0] = updates[0, 0]
    updates[:, 1] = 0
    found = combined("nuslerp", updates, along="rows")
    assert found.isfinite().all()
    assert relative(found[0], updates[0, 0]) < 1e-7 and not found[1].any()


def test_a_group_of_tensors_has_no_rows() -> None:
    from tests.merging.merges import mix

    with pytest.raises(UserError, match=r"merge\.scope=tensor"):
        list(mix("nuslerp", scope="brick").groups([("a", "a"), ("b", "b")]))
