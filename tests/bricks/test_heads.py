"""Heads: the regression head's own unit, and what is kept of it."""

from __future__ import annotations

import torch

from cfm_train.bricks.heads import Head
from cfm_train.training.objectives import headed_result


def test_a_regression_head_answers_in_the_targets_unit() -> None:
    """Targets around 1,000: an untrained head says their mean, at a loss of 1."""
    targets = torch.tensor([900.0, 1000.0, 1100.0, 1200.0])
    head = Head("regression", None, 4, "mean")
    torch.nn.init.zeros_(head.linear.weight)
    head.standardise(targets)
    said = head(torch.randn(4, 3, 4), torch.ones(4, 3))
    torch.testing.assert_close(said[:, 0], torch.full((4,), 1050.0))
    result = headed_result("regression", said, targets, head.spread)
    torch.testing.assert_close(result.loss / result.count, torch.tensor(1.0))
    kept = Head.from_description(head.describe())
    kept.load_state_dict(head.state_dict())
    assert torch.equal(
        kept(torch.ones(1, 1, 4), torch.ones(1, 1)), head(torch.ones(1, 1, 4), torch.ones(1, 1))
    )


def test_equal_targets_are_no_division_by_zero() -> None:
    """One value for all rows: the spread stays a positive number."""
    head = Head("regression", None, 4, "mean")
    head.standardise(torch.full((3,), 7.0))
    assert head.spread is not None and float(head.spread) > 0
    assert torch.isfinite(head(torch.ones(1, 2, 4), torch.ones(1, 2))).all()
