"""Ridge, CKA and penalties against NumPy: least squares by lstsq, CKA by loops, losses by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cfm_train.stitching.layers.cka import CKA, choose
from cfm_train.stitching.layers.measuring import Measured, difference
from cfm_train.stitching.layers.ridge import Moments, solve

GRID = [0.0, 1e-3, 1e-2, 0.1, 1.0]


def streams(tokens: int, seed: int, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated x ``[tokens, 5]`` and noisy y ``[tokens, 3]``, far from zero where asked."""
    draw = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(5, 5))
    truth = np.random.default_rng(8).normal(size=(5, 3))
    x = draw.normal(size=(tokens, 5)) @ mixing + offset
    return x, (x - offset) @ truth + 2 * draw.normal(size=(tokens, 3)) - 3 * offset


def moments(x: np.ndarray, y: np.ndarray, like: Moments | None = None, batch: int = 7) -> Moments:
    found = Moments(like)
    for start in range(0, len(x), batch):
        found.add(*(torch.from_numpy(z[start : start + batch]) for z in (x, y)))
    return found


def lstsq(x: np.ndarray, y: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Ridge with a free intercept as ordinary least squares on rows that were added."""
    scale = x.var(axis=0).mean()
    extra = np.sqrt(len(x) * ridge * scale) * np.eye(x.shape[1])
    rows = np.hstack([np.vstack([x, extra]), np.r_[np.ones(len(x)), np.zeros(len(extra))][:, None]])
    found = np.linalg.lstsq(rows, np.vstack([y, np.zeros((len(extra), y.shape[1]))]), rcond=None)[0]
    return found[:-1].T, found[-1]


@pytest.mark.parametrize("ridge", GRID)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_closed_form_is_least_squares(ridge: float, offset: float) -> None:
    x, y = streams(60, 1, offset)
    train = moments(x, y)
    fit = solve(train, moments(*streams(30, 2, offset), like=train), [ridge])
    weight, bias = lstsq(x - offset, y, ridge)  # moved, or lstsq itself loses the digits
    np.testing.assert_allclose(fit.weight, weight, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(fit.bias, bias - weight @ np.full(5, offset), rtol=1e-8, atol=1e-5)


def test_the_ridge_is_chosen_by_the_error_on_held_out_tokens() -> None:
    x, y = streams(8, 1)  # few tokens and much noise: plain least squares is not the best
    held_x, held_y = streams(500, 2)
    train = moments(x, y)
    fit = solve(train, moments(held_x, held_y, like=train), GRID)
    constant = np.square(held_y - y.mean(axis=0)).sum()
    errors = {}
    for ridge in GRID:
        weight, bias = lstsq(x, y, ridge)
        errors[ridge] = np.square(held_y - held_x @ weight.T - bias).sum() / constant
        assert fit.errors[ridge] == pytest.approx(errors[ridge], rel=1e-9)
    assert fit.ridge == min(errors, key=lambda r: errors[r]) > 0


def test_features_that_depend_on_each_other() -> None:
    """Without a ridge the solution of least norm, as lstsq gives it on centred states."""
    x, y = streams(40, 3)
    x = np.hstack([x, x[:, :2]])
    train = moments(x, y)
    fit = solve(train, moments(x, y, like=train), [0.0])
    centred = np.linalg.lstsq(x - x.mean(axis=0), y - y.mean(axis=0), rcond=None)[0]
    np.testing.assert_allclose(fit.weight, centred.T, atol=1e-8)


def hsic(k: np.ndarray, other: np.ndarray) -> float:
    """Song et al. (2012), eq. 5, term by term over distinct tokens."""
    n = len(k)
    two = three = four = 0.0
    for a, b in itertools.permutations(range(n), 2):
        two += k[a, b] * other[a, b]
    for a, b, c in itertools.permutations(range(n), 3):
        three += k[a, b] * other[b, c]
    for a, b, c, d in itertools.permutations(range(n), 4):
        four += k[a, b] * other[c, d]
    falling = [n * (n - 1), n * (n - 1) * (n - 2), n * (n - 1) * (n - 2) * (n - 3)]
    return two / falling[0] + four / falling[2] - 2 * three / falling[1]


def test_cka_as_sums_over_distinct_tokens() -> None:
    draw = np.random.default_rng(0)
    blocks = [[draw.normal(1, 2, size=(7, w)) for w in (3, 6, 4)] for _ in range(2)]
    cka = CKA()
    for block in blocks:
        tensors = [torch.from_numpy(x) for x in block]
        cka.add(tensors[:2], tensors[2:])
    found = cka.matrix()
    for row in range(2):
        cross, own, other = (
            sum(hsic(block[a] @ block[a].T, block[b] @ block[b].T) for block in blocks)
            for a, b in ((row, 2), (row, row), (2, 2))
        )
        assert found[row][0] == pytest.approx(cross / np.sqrt(own * other), rel=1e-9)


def test_what_cka_sees_and_what_not() -> None:
    """Blind to rotation, scale and offset; unrelated wide states are not alike on few tokens."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=draw, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=draw, dtype=torch.float64)).Q
    wide = [torch.randn(64, 512, generator=draw, dtype=torch.float64) for _ in range(2)]
    cka = CKA()
    cka.add([x, wide[0]], [3 * x @ turn + 5, wide[1], torch.ones(64, 2)])
    matrix = cka.matrix()
    assert matrix[0][0] == pytest.approx(1, abs=1e-12)
    assert abs(matrix[1][1]) < 0.15  # the biased estimator gives about 0.9 here
    assert matrix[0][2] == matrix[1][2] == 0


def test_the_stitch_point() -> None:
    matrix = [[9.0, 9, 9, 9], [0, 5, 1, 9], [0, 1, 4, 9], [2, 1, 3, 9]]  # 3 and 3 layers
    assert choose(matrix, None) == (1, 1)
    assert choose(matrix, [3, 3]) == (1, 1)
    assert choose(matrix, [4, 6]) == (3, 2)
    assert choose(matrix, [5, 6]) == (3, 0)
    assert choose(matrix, [2, 2]) == (1, 2)


def test_the_penalty_is_paired() -> None:
    draw = np.random.default_rng(3)
    tokens = draw.integers(5, 50, size=40)
    hard = draw.normal(2, 1, size=40).clip(0.1)
    one, other = Measured((hard + 0.1) * tokens, tokens), Measured(hard * tokens, tokens)
    found = difference(one, other, 500, 0)
    assert found["loss"].value == pytest.approx(0.1)
    assert found["loss"].low == pytest.approx(0.1) == found["loss"].high  # the same on every one
    assert found["perplexity"].value == pytest.approx(np.exp(one.loss) - np.exp(other.loss))
    assert found["perplexity"].low < found["perplexity"].value < found["perplexity"].high
    with pytest.raises(ValueError, match="same documents"):
        difference(one, Measured(other.nats, tokens + 1), 10, 0)
