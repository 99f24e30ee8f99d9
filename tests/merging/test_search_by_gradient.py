"""Weights by gradient: the slope in float64, descents of loss and entropy, language tasks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cfm_train.backbone.load import Backbone, load_backbone
from cfm_train.backbone.spec import resolve
from cfm_train.config.merging import complete
from cfm_train.data.sources import check_all
from cfm_train.operations.bench import Bench, entropy
from cfm_train.operations.sought import Sought
from tests.backbones import batch, plain_model, section, tiny
from tests.merging.benches import LABELS, bench_of, searching, tried_by
from tests.merging.merges import ONE, TWO, make, updates
from tests.tasks import section as data_section


def test_entropy_against_scipy() -> None:
    from scipy.stats import entropy as reference

    logits = 3 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = torch.tensor([reference(row) for row in logits.softmax(-1).numpy()])
    torch.testing.assert_close(entropy(logits, several=False), one)
    p = logits.sigmoid().numpy()
    many = torch.tensor([sum(reference([x, 1 - x]) for x in row) for row in p])
    torch.testing.assert_close(entropy(logits, several=True), many)


@pytest.fixture(scope="module")
def doubled() -> Backbone:
    """The tiny encoder in float64."""
    backbone = load_backbone(resolve(section("bert")), dtype="float32")
    backbone.model.double()
    return backbone


def exact_loss(bench: Bench, knots: Sequence[Sequence[float]], scale: float) -> list[float]:
    """Each task's mean loss in float64 by transformers' own model with ΔW added to its weights.

    ``knots`` has the weights of each brick, layer by layer.
    """
    model = plain_model("bert").double()
    for number, brick in enumerate(bench.bricks):
        for name, update in updates(brick).items():
            weight = model.get_submodule(bench.backbone.sites[name].module).weight
            layer = int(name.split(".")[1])
            weight.data += scale * knots[number][layer] * update
    losses = []
    for name, rows in bench.rows.items():
        head = bench.heads[name]
        assert head is not None
        total = 0.0
        for i in range(len(rows)):
            ids = torch.tensor(np.array(rows.slice("input_ids", i)), dtype=torch.int64)[None]
            with torch.no_grad():
                pooled = model(input_ids=ids).last_hidden_state.mean(1)
                logits = F.linear(pooled, head.linear.weight.double(), head.linear.bias.double())
            label = torch.tensor([int(rows.arrays["labels"][i])])
            total += F.cross_entropy(logits, label).item()
        losses.append(total / len(rows))
    return losses


@pytest.mark.parametrize(("by", "balance"), [("brick", False), ("layer", False), ("layer", True)])
def test_the_slope_is_that_of_the_merged_model(
    by: str, balance: bool, tmp_path: Path, doubled: Backbone
) -> None:
    """Against central differences in float64 of the model with the merge in its weights."""
    bench = bench_of(
        tmp_path, "gradient", "task_arithmetic", by=by, balance=balance, batch=64,
        backbone=doubled, merge={"scale": 0.7}, given=(0.4, 0.9),
    )  # fmt: skip
    count = 2 if by == "layer" else 1
    assert len(bench.axes) == 2 * count
    start = torch.tensor(bench.problem.start, dtype=torch.float64).view(2, count)
    if by == "layer":
        start = start + torch.tensor([[0.0, 0.3], [-0.5, 0.0]], dtype=torch.float64)
    weights = start.clone().requires_grad_()
    loss = bench.slope(weights, 0)
    assert weights.grad is not None

    units = [1.0, 1.0]
    if balance:  # each task's loss is a share of its own at the start
        given = torch.tensor([[0.4], [0.9]], dtype=torch.float64)
        units = exact_loss(bench, given.expand(2, 2).tolist(), 0.7)
        assert abs(units[0] - units[1]) > 0.05

    def at(knots: torch.Tensor) -> float:
        losses = exact_loss(bench, knots.expand(2, 2).tolist(), 0.7)
        return sum(loss / unit for loss, unit in zip(losses, units, strict=True)) / 2

    assert loss == pytest.approx(at(start), rel=1e-5)
    for place in itertools.product(range(2), range(count)):
        step = torch.zeros_like(start)
        step[place] = 1e-4
        expected = (at(start + step) - at(start - step)) / 2e-4
        assert weights.grad[place].item() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    # What is compared afterwards, and what the expression makes, are the same function.
    tried = bench.try_out(start.flatten().tolist())
    assert tried.cost == pytest.approx(loss, rel=1e-5)
    losses = exact_loss(bench, start.expand(2, 2).tolist(), 0.7)
    assert list(tried.scores.values()) == pytest.approx(losses, rel=1e-5)
    assert tried.value == tried.cost and bench.search.compared.endswith("loss")
    made = bench.merged(bench.mix, bench.weights(start.flatten().tolist()))
    inputs = batch(doubled)
    with doubled.slots.plugged([made]), torch.inference_mode():
        merged = doubled.hidden_states(**inputs)
    assert bench._followed is not None
    with doubled.slots.plugged(bench._followed.parts, bench._followed.weights(start)):
        torch.testing.assert_close(
            doubled.hidden_states(**inputs).detach(), merged, atol=1e-5, rtol=1e-5
        )


def test_the_gradient_goes_down_and_comes_back_the_same(tmp_path: Path) -> None:
    options = {"steps": 12, "every": 4, "learning_rate": 0.05}
    seen = list(tried_by(bench_of(tmp_path, "gradient", **options)))
    assert len(seen) == 4 and seen[0].point == [0.5] * 4
    assert min(one.value for one in seen) < seen[0].value
    assert list(tried_by(bench_of(tmp_path, "gradient", **options))) == seen


def test_adamerging_lowers_entropy_and_sees_no_label(tmp_path: Path) -> None:
    options = {"steps": 12, "every": 6, "learning_rate": 0.05}
    bench = bench_of(tmp_path, "adamerging", **options)
    for rows in bench.rows.values():
        assert "labels" not in rows.arrays and not rows.rows
    seen = list(tried_by(bench))
    assert seen[-1].value < seen[0].value
    assert list(tried_by(bench_of(tmp_path, "adamerging", flip=True, **options))) == seen


def test_language_tasks_need_no_head(tmp_path: Path) -> None:
    """The loss that is descended on all rows at once is the one that is compared."""
    (task,) = check_all(data_section("causal", tmp_path, rows=32, name="a"))
    section = searching("gradient", batch=64, by="layer")
    bricks = [
        brick.requires_grad_(False) for brick in (make("llama", ONE, 1), make("llama", TWO, 2))
    ]
    bench = Bench(
        bricks,
        tiny("llama"),
        complete("linear", {}),
        [0.8, -0.3],
        sought=Sought(section, [], {"a": task}, {"a": task.rows["validation"]}),
        labels=LABELS,
        sources=LABELS,
        statistics=None,
        seed=0,
    )
    weights = torch.tensor(bench.problem.start, dtype=torch.float64).view(2, -1).requires_grad_()
    loss = bench.slope(weights, 0)
    assert weights.grad is not None and bool(weights.grad.abs().min() > 0)
    assert loss == pytest.approx(1.0, rel=1e-5)  # all of what it is at the start
    assert bench.try_out(bench.problem.start).cost == pytest.approx(loss, rel=1e-5)
