"""Ways to find weights, as methods on functions whose minimum is known, and on real rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cfm_train.backbone.load import Backbone, load_backbone
from cfm_train.backbone.spec import resolve
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.heads import Head
from cfm_train.config.compose import option
from cfm_train.config.merging import complete
from cfm_train.config.searching import Axis, axes_of, check_method, methods, model_of
from cfm_train.data.sources import check_all
from cfm_train.data.splits import take
from cfm_train.errors import UserError
from cfm_train.evaluation.judge import judge_task
from cfm_train.merging import engine
from cfm_train.merging.mix import make_mix
from cfm_train.merging.search.bayes import expected_improvement
from cfm_train.merging.search.cma_es import Strategy
from cfm_train.merging.search.search import Problem, Proposals, lower, make_search
from cfm_train.operations.bench import Bench, entropy
from cfm_train.operations.sought import Sought
from tests.backbones import batch, plain_model, section, tiny
from tests.merging.merges import ONE, TWO, make, updates
from tests.tasks import section as data_section

LABELS = ["a", "b"]


def searching(kind: str, **given: Any) -> dict[str, Any]:
    """The section ``search`` of an option."""
    return model_of(kind).model_validate({**option("search", kind), **given}).model_dump()


def problem(*bounds: tuple[float, float], seed: int = 0) -> Problem:
    """A problem of some axes, from the middle of each."""
    axes = [Axis(f"x{at}", one, True) for at, one in enumerate(bounds)]
    return Problem(axes, [sum(one) / 2 for one in bounds], seed, lambda point: False)


def walk(
    proposals: Proposals, cost: Callable[[Sequence[float]], float]
) -> list[tuple[tuple[float, ...], float]]:
    """Every point proposed with its cost."""
    seen, point = [], next(proposals)
    while True:
        seen.append((tuple(point), cost(point)))
        try:
            point = proposals.send(seen[-1][1])
        except StopIteration:
            return seen


def ellipsoid(x: np.ndarray) -> float:
    return float(np.square(x) @ 10.0 ** np.arange(len(x)))


def rosenbrock(x: np.ndarray) -> float:
    return float(100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2)


@pytest.mark.parametrize(
    ("function", "size", "generations", "minimum"),
    [(ellipsoid, 1, 40, 0.0), (ellipsoid, 4, 100, 0.0), (rosenbrock, 2, 120, 1.0)],
)
def test_cma_es_minimises(
    function: Callable[[np.ndarray], float], size: int, generations: int, minimum: float
) -> None:
    strategy = Strategy(np.full(size, -0.5), 0.3, np.random.default_rng(0))
    for _ in range(generations):
        points = strategy.draw()
        strategy.learn(points, [function(point) for point in points])
    assert np.abs(strategy.mean - minimum).max() < 1e-4
    assert np.linalg.eigvalsh(strategy.C).min() > 0


def test_cma_es_takes_the_constants_of_the_tutorial() -> None:
    """Table 1 for n = 4: what Hansen's own formulas give, written out once more."""
    strategy = Strategy(np.zeros(4), 1.0, np.random.default_rng(0))
    assert strategy.size == 8
    raw = np.log(4.5) - np.log(np.arange(1, 9))
    assert strategy.weights[:4] == pytest.approx(raw[:4] / raw[:4].sum())
    assert strategy.mu_eff == pytest.approx(raw[:4].sum() ** 2 / (raw[:4] ** 2).sum())
    assert strategy.weights[4:].sum() < 0 and (strategy.weights[4:] <= 0).all()
    assert strategy.length == pytest.approx(1.8800, abs=1e-3)  # sqrt(2) Γ(5/2) / Γ(2)


@pytest.mark.parametrize("kind", ["bayes", "cma_es"])
def test_bounds_hold_and_the_minimum_is_found_again(kind: str) -> None:
    """A minimum inside, and one beyond the bounds, which ends on the border."""
    trials = 16 if kind == "bayes" else 120
    search = make_search(searching(kind, trials=trials))
    where = problem((0.0, 2.0), (-1.0, 1.0))

    def cost(point: Sequence[float]) -> float:
        return (point[0] - 1.4) ** 2 + (point[1] - 1.5) ** 2

    seen = walk(search.propose(where), cost)
    assert len(seen) == trials == search.count(where)
    assert all(0 <= x <= 2 and -1 <= y <= 1 for (x, y), _ in seen)
    best = seen[lower([one for _, one in seen])][0]
    assert best == pytest.approx((1.4, 1.0), abs=0.1)
    assert walk(search.propose(where), cost) == seen
    short = make_search(searching(kind, trials=4))
    assert walk(short.propose(replace(where, seed=1)), cost) != seen[:4]


def test_expected_improvement_is_an_expectation() -> None:
    drawn = np.random.default_rng(0).standard_normal(400_000)
    for mean, deviation in ((0.3, 0.5), (1.2, 0.4), (0.0, 1e-3)):
        gain = np.maximum(0.6 - (mean + deviation * drawn), 0).mean()
        found = expected_improvement(np.array([mean]), np.array([deviation]), 0.6)[0]
        assert found == pytest.approx(gain, abs=2e-3)


def test_lorahub_starts_at_zero_and_keeps_weights_small() -> None:
    search = make_search(searching("lorahub", trials=60, l1=0.1))
    where = problem((-1.5, 1.5), (-1.5, 1.5))

    def cost(point: Sequence[float]) -> float:
        # The second weight hardly matters: the penalty puts it near zero.
        return (point[0] - 1) ** 2 + 0.001 * (point[1] - 1) ** 2 + search.penalty(point)

    seen = walk(search.propose(where), cost)
    assert seen[0][0] == (0.0, 0.0)
    assert search.penalty([1.0, -0.5]) == pytest.approx(0.1 * 1.5 / 2)  # their code: the mean
    best = seen[lower([one for _, one in seen])][0]
    # (x - 1)² + 0.05 |x| is least at 1 - 0.05 / 2.
    assert best[0] == pytest.approx(0.975, abs=0.1) and abs(best[1]) < 0.15


def test_entropy_against_scipy() -> None:
    from scipy.stats import entropy as reference

    logits = 3 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = torch.tensor([reference(row) for row in logits.softmax(-1).numpy()])
    torch.testing.assert_close(entropy(logits, several=False), one)
    p = logits.sigmoid().numpy()
    many = torch.tensor([sum(reference([x, 1 - x]) for x in row) for row in p])
    torch.testing.assert_close(entropy(logits, several=True), many)


# ---------------------------------------------------------------- on real rows


def with_heads(family: str = "bert") -> list[Brick]:
    """Two bricks of different ranks, scales and sites, each with a head of its own."""
    bricks = [make(family, ONE, 1), make(family, TWO, 2)]
    for brick, name in zip(bricks, LABELS, strict=True):
        torch.manual_seed(ord(name))
        head = Head("classification", ["no", "yes"], 32, "mean")
        torch.nn.init.normal_(head.linear.weight, std=0.5)
        brick.add_head(name, head)
        brick.requires_grad_(False)
    return bricks


def bench_of(
    folder: Path,
    kind: str,
    rule: str = "linear",
    *,
    given: Any = (0.5, 0.5),
    backbone: Backbone | None = None,
    flip: bool = False,
    merge: Any = (),
    **search: Any,
) -> Bench:
    """A bench for two tasks on the tiny encoder; ``flip`` turns the labels of all test rows."""
    chosen, mixed = searching(kind, **search), complete(rule, dict(merge))
    tasks = {}
    for number, name in enumerate(LABELS):
        rows = data_section("classification", folder, seed=number, rows=48, name=name)
        (tasks[name],) = check_all(rows)
        for row in tasks[name].rows["test"] if flip else ():
            row["label"] = 1 - row["label"]
    method = make_search(chosen)
    split = "test" if method.chosen_on == "test inputs" else "validation"
    decide = {name: take(task.rows[split], chosen["rows"]) for name, task in tasks.items()}
    return Bench(
        with_heads(),
        backbone or tiny("bert"),
        mixed,
        list(given) if mixed["equal"] else None,
        sought=Sought(chosen, axes_of(chosen, mixed, LABELS, None), tasks, decide),
        labels=LABELS,
        sources=LABELS,
        statistics=None,
        seed=0,
    )


def by_hand(
    bench: Bench, rule: str, weights: Sequence[float] | None, **merge: Any
) -> tuple[float, float]:
    """Mean accuracy and loss on the bench's rows of a merge that is really made."""
    mix = make_mix(complete(rule, merge))
    made = engine.merge(bench.bricks, weights, mix, bench.backbone, sources=LABELS).brick
    accuracy, loss = [], []
    for name, rows in bench.rows.items():
        with bench.backbone.slots.plugged([made]):
            answers = judge_task(bench.backbone, made.head_for(name), bench.specs[name], rows)
        right = [answers.predictions[i] == answers.references[i] for i in answers.predictions]
        accuracy.append(sum(right) / len(right))
        loss.append(answers.loss())
    return sum(accuracy) / 2, sum(loss) / 2


@pytest.mark.parametrize("objective", ["metric", "loss"])
def test_grid_finds_what_a_loop_finds(objective: str, tmp_path: Path) -> None:
    bench = bench_of(
        tmp_path,
        "grid",
        "task_arithmetic",
        objective=objective,
        weights=[0.0, 1.5],
        space={"scale": [0.5, 2.0]},
    )
    seen = [bench.try_out(point) for point in bench.search.propose(bench.problem)]
    points = [(*w, s) for w in itertools.product([0.0, 1.5], repeat=2) for s in (0.5, 2.0)]
    assert [tuple(one.point) for one in seen] == points
    at = 0 if objective == "metric" else 1
    loop = [by_hand(bench, "task_arithmetic", p[:2], scale=p[2])[at] for p in points]
    assert [one.value for one in seen] == pytest.approx(loop, abs=1e-5)
    sign = -1 if objective == "metric" else 1
    best = lower([one.cost for one in seen])
    assert best == min(range(len(loop)), key=lambda i: (round(sign * loop[i], 5), i))
    assert bench.weights(seen[best].point) == list(points[best][:2])
    assert bench.mixed(seen[best].point)["scale"] == points[best][2]


def test_other_rules_are_merged_anew(tmp_path: Path) -> None:
    bench = bench_of(
        tmp_path, "grid", "ties/mergekit", objective="loss",
        weights=[0.0, 1.0], space={"density": [0.3, 0.8]},
    )  # fmt: skip
    seen = [bench.try_out(point) for point in bench.search.propose(bench.problem)]
    assert len(seen) == 6  # nothing is left to be averaged with weights of zero
    for one in seen:
        *weights, density = one.point
        _, loss = by_hand(bench, "ties/mergekit", weights, density=density)
        assert one.value == pytest.approx(loss, abs=1e-6)


def test_parameters_of_a_rule_without_weights(tmp_path: Path) -> None:
    bench = bench_of(
        tmp_path, "grid", "magmax", objective="loss", weights=None, space={"scale": [0.2, 1.0]}
    )
    seen = [bench.try_out(point) for point in bench.search.propose(bench.problem)]
    assert [one.value for one in seen] == pytest.approx(
        [by_hand(bench, "magmax", None, scale=s)[1] for s in (0.2, 1.0)], abs=1e-6
    )
    assert bench.weights(seen[0].point) is None


@pytest.fixture(scope="module")
def doubled() -> Backbone:
    """The tiny encoder in float64."""
    backbone = load_backbone(resolve(section("bert")), dtype="float32")
    backbone.model.double()
    return backbone


def exact_loss(bench: Bench, knots: Sequence[Sequence[float]], scale: float) -> float:
    """The mean loss in float64 by transformers' own model with ΔW added to its weights.

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
    return sum(losses) / len(losses)


@pytest.mark.parametrize("by", ["brick", "layer"])
def test_the_slope_is_that_of_the_merged_model(by: str, tmp_path: Path, doubled: Backbone) -> None:
    """Against central differences in float64 of the model with the merge in its weights."""
    bench = bench_of(
        tmp_path, "gradient", "task_arithmetic", by=by, batch=64, backbone=doubled,
        merge={"scale": 0.7}, given=(0.4, 0.9),
    )  # fmt: skip
    count = 2 if by == "layer" else 1
    assert len(bench.axes) == 2 * count
    start = torch.tensor(bench.problem.start, dtype=torch.float64).view(2, count)
    if by == "layer":
        start = start + torch.tensor([[0.0, 0.3], [-0.5, 0.0]], dtype=torch.float64)
    weights = start.clone().requires_grad_()
    loss = bench.slope(weights, 0)
    assert weights.grad is not None

    def at(knots: torch.Tensor) -> float:
        return exact_loss(bench, knots.expand(2, 2).tolist(), 0.7)

    assert loss == pytest.approx(at(start), rel=1e-5)
    for place in itertools.product(range(2), range(count)):
        step = torch.zeros_like(start)
        step[place] = 1e-4
        expected = (at(start + step) - at(start - step)) / 2e-4
        assert weights.grad[place].item() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    # What is compared afterwards, and what the expression makes, are the same function.
    tried = bench.try_out(start.flatten().tolist())
    assert tried.value == pytest.approx(loss, rel=1e-5)
    made = bench.merged(bench.mix, bench.weights(start.flatten().tolist()))
    inputs = batch(doubled)
    with doubled.slots.plugged([made]), torch.inference_mode():
        merged = doubled.hidden_states(**inputs)
    assert bench._followed is not None
    with doubled.slots.plugged(bench._followed.parts, bench._followed.weights(start)):
        torch.testing.assert_close(
            doubled.hidden_states(**inputs).detach(), merged, atol=1e-5, rtol=1e-5
        )


def tried_by(bench: Bench) -> Iterator[Any]:
    """Every trial of a bench's search."""
    proposals = bench.search.propose(bench.problem)
    point = next(proposals)
    while True:
        tried = bench.try_out(point)
        yield tried
        try:
            point = proposals.send(tried.cost)
        except StopIteration:
            return


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


REFUSED: dict[str, tuple[str, str, Any, dict[str, Any], str]] = {
    "weights of none": ("grid", "magmax", None, {}, "rule=magmax takes no weights"),
    "given": ("grid", "linear", [0.1, 0.2], {}, "are what search=grid finds"),
    "unknown": (
        "grid", "linear", None, {"space": {"densty": [0.1]}}, "'densty' is no number of rule=linear"
    ),
    "not of the sparsifier": ("grid", "linear", None, {"space": {"density": [0.1]}}, "no number"),
    "out of range": ("grid", "ties", None, {"space": {"density": [1.5]}}, "density must be"),
    "too many": ("grid", "linear", None, {"most": 10}, "would try 25 combinations"),
    "nothing": ("bayes", "linear", None, {"weights": None}, "nothing to search"),
    "no bounds": ("bayes", "linear", None, {"weights": [1.0, 0.0]}, "lowest and the highest"),
    "whole": ("cma_es", "linear", None, {"space": {"rank": [2, 8]}}, "whole numbers"),
    "twice": ("grid", "linear", None, {"weights": [0.5, 0.5]}, "once"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_searched_is_refused(case: str) -> None:
    kind, rule, given, search, sentence = REFUSED[case]
    with pytest.raises(UserError, match=sentence):
        axes_of(searching(kind, **search), complete(rule, {}), LABELS, given)


def test_every_method_has_an_option() -> None:
    from cfm_train.config.catalogue import groups

    assert {"none", *methods()} == set(groups()["search"])
    for kind in methods():
        assert make_search(searching(kind)).kind == kind


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="search=bayes needs scikit-learn"):
        check_method(searching("bayes"), complete("linear", {}))
    check_method(searching("grid"), complete("linear", {}))


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
    assert bench.try_out(bench.problem.start).value == pytest.approx(loss, rel=1e-5)
