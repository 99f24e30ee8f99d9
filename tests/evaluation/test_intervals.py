"""The intervals against SciPy's bootstrap, a naive one, and the coverage that they promise."""

from __future__ import annotations

import time

import numpy as np
import pytest
import sklearn.metrics as sk
from scipy import stats

from cfm_train.evaluation.intervals import paired_interval, resample_weights
from cfm_train.evaluation.metrics import score

N = 120


def sides(task_type: str) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(4)
    if task_type == "regression":
        x, noise = generator.normal(size=(2, N))
        return np.round(x + noise, 1), np.round(x, 1)  # rounded, so that there are ties
    wanted = generator.integers(0, 4, N)
    return np.where(generator.random(N) < 0.7, wanted, generator.integers(0, 4, N)), wanted


@pytest.mark.parametrize(
    ("task_type", "name", "oracle"),
    [
        ("classification", "accuracy", lambda p, w: sk.accuracy_score(w, p)),
        ("classification", "macro_f1", lambda p, w: sk.f1_score(w, p, average="macro")),
        ("classification", "mcc", lambda p, w: sk.matthews_corrcoef(w, p)),
        ("regression", "pearson", lambda p, w: np.corrcoef(p, w)[0, 1]),
        ("regression", "spearman", lambda p, w: stats.spearmanr(p, w)[0]),
        ("regression", "rmse", lambda p, w: sk.root_mean_squared_error(w, p)),
    ],
)
def test_interval_equals_scipys_bootstrap(task_type: str, name: str, oracle) -> None:
    predicted, wanted = sides(task_type)
    ours = score(task_type, predicted, wanted, bootstrap=4000)[name]
    theirs = stats.bootstrap(
        (predicted, wanted), oracle, n_resamples=1500, method="percentile", paired=True,
        vectorized=False, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    # Both ends carry the resampling's own error, about a twentieth of the width at these sizes.
    assert ours.low == pytest.approx(theirs.low, abs=0.08 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.08 * width)


def test_both_ways_of_drawing_have_the_multinomial_moments() -> None:
    few, many = np.array([90, 9, 1]), np.ones(40, dtype=np.int64)
    for counts in (few, many):
        weights = np.concatenate(list(resample_weights(counts, 20_000, seed=0)))
        n, share = counts.sum(), counts / counts.sum()
        assert (weights.sum(-1) == n).all()
        error = np.sqrt(n * share * (1 - share) / len(weights))
        assert (np.abs(weights.mean(0) - counts) < 5 * error).all()
        covariance = n * (np.diag(share) - np.outer(share, share))
        assert np.abs(np.cov(weights.T) - covariance).max() < 0.05 * covariance.max() + 0.02


def test_blocks_do_not_change_the_number_of_resamples() -> None:
    counts = np.ones(300_000, dtype=np.int64)  # six resamples to a block
    blocks = [weights.shape for weights in resample_weights(counts, 10, seed=0)]
    assert blocks == [(6, 300_000), (4, 300_000)]


def test_coverage_of_accuracy_and_pearson_is_near_95_percent() -> None:
    generator = np.random.default_rng(5)
    held = {"accuracy": 0, "pearson": 0, "loss": 0}
    trials = 400
    for trial in range(trials):
        wanted = generator.integers(0, 2, 150)
        predicted = np.where(generator.random(150) < 0.8, wanted, 1 - wanted)
        x, noise = generator.normal(size=(2, 150))
        tokens = generator.integers(1, 30, 150)
        nats = generator.gamma(2.0, size=150) * tokens  # a row's own difficulty: 2 nats on average
        figures = {
            "accuracy": (
                score("classification", predicted, wanted, bootstrap=300, seed=trial),
                0.8,
            ),
            "pearson": (score("regression", x + noise, x, bootstrap=300, seed=trial), 0.5**0.5),
            "loss": (score("causal", nats, tokens, bootstrap=300, seed=trial), 2.0),
        }
        for name, (scores, truth) in figures.items():
            held[name] += scores[name].low <= truth <= scores[name].high
    for name, count in held.items():  # 3 standard errors of 400 trials are 3.3 points
        assert 0.905 <= count / trials <= 0.985, (name, count / trials)


def test_paired_interval_equals_scipy_and_sees_what_two_intervals_hide() -> None:
    generator = np.random.default_rng(6)
    hardness = generator.normal(size=200)
    a, b = hardness + 0.1 + 0.2 * generator.normal(size=200), hardness
    ours = paired_interval(a, b, bootstrap=4000)
    theirs = stats.bootstrap(
        (a - b,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert ours.value == pytest.approx((a - b).mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.005)
    assert ours.low > 0 and ours.n == 200
    alone = [score("regression", side, np.zeros(200))["rmse"] for side in (a, b)]
    assert alone[0].low < alone[1].high  # the separate intervals overlap


def test_paired_interval_names_wrong_input() -> None:
    for a, b in (([1.0], [1.0, 2.0]), ([], []), ([np.nan], [1.0])):
        with pytest.raises(ValueError, match="paired scores"):
            paired_interval(np.array(a), np.array(b))


def test_same_seed_same_interval_and_another_seed_another() -> None:
    predicted, wanted = sides("classification")
    first, again, other = (score("classification", predicted, wanted, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first["macro_f1"] != other["macro_f1"]
    assert first["macro_f1"].value == other["macro_f1"].value


def test_ten_thousand_rows_of_classification_take_a_moment() -> None:
    """In processor time, which other work on the machine does not add to."""
    generator = np.random.default_rng(7)
    wanted = generator.integers(0, 77, 10_000)
    predicted = np.where(generator.random(10_000) < 0.9, wanted, generator.integers(0, 77, 10_000))
    start = time.process_time()
    score("classification", predicted, wanted)
    assert time.process_time() - start < 20  # 0.2 s on a quiet core; a loop over rows takes minutes
