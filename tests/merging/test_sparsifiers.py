"""What is dropped and how the rest is rescaled, against mergekit, PEFT and loops."""

from __future__ import annotations

import pytest
import torch

from cfm_train.config.merging import complete
from cfm_train.errors import UserError
from cfm_train.merging.mix import make_mix
from cfm_train.merging.sparsify.sparsifier import generator
from tests.merging.merges import mix, random_updates, relative

NAMES = ["a@1", "b@2", "c@3"]


def sparse(name: str, updates: torch.Tensor, seed: int = 0, **given: object) -> torch.Tensor:
    """The updates after a sparsifier, by its option."""
    made = mix("linear", sparsify=name, **given).sparsifier
    return made.sparsify(updates, [generator(seed, "x", n) for n in NAMES[: len(updates)]])


@pytest.mark.parametrize("shape", [(37,), (6, 9)])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("rescale", ["none", "l1"])
def test_magnitude_and_breadcrumbs_equal_mergekit(
    shape: tuple[int, ...], density: float, rescale: str
) -> None:
    from mergekit.sparsify import RescaleNorm, magnitude, magnitude_outliers

    norm = RescaleNorm.l1 if rescale == "l1" else None
    updates = random_updates(3, *shape)
    found = sparse("magnitude", updates, density=density, rescale=rescale)
    for one, kept in zip(updates, found, strict=True):
        assert relative(kept, magnitude(one, density, norm)) < 1e-6
    for gamma in (0.0, 0.01, 0.1, 0.95):
        found = sparse("breadcrumbs", updates, density=density, gamma=gamma, rescale=rescale)
        for one, kept in zip(updates, found, strict=True):
            if int(density * one.numel()):
                assert relative(kept, magnitude_outliers(one, density, norm, gamma)) < 1e-6
            else:  # never nothing
                assert kept.count_nonzero() == 1


@pytest.mark.parametrize("density", [0.1, 0.25, 0.8])
def test_magnitude_equals_peft(density: float) -> None:
    from peft.utils.merge_utils import prune

    updates = random_updates(3, 6, 10)
    found = sparse("magnitude", updates, density=density)
    for one, kept in zip(updates, found, strict=True):
        assert torch.equal(kept, prune(one, density, method="magnitude"))


@pytest.mark.parametrize("name", ["magnitude", "breadcrumbs"])
def test_exactly_so_many_are_kept_of_equal_numbers(name: str) -> None:
    found = sparse(name, torch.ones(2, 5, 8), density=0.3)
    assert [int(kept.count_nonzero()) for kept in found] == [12, 12]
    assert not sparse(name, torch.ones(2, 5, 8), density=0.0).any()


def test_breadcrumbs_drop_outliers_and_small_numbers() -> None:
    numbers = torch.tensor([[3.0, -9.0, 1.0, 0.5, -4.0, 8.0, -2.0, 7.0, 0.1, 5.0]])
    found = sparse("breadcrumbs", numbers, density=0.3, gamma=0.2)
    assert found.tolist() == [[0, 0, 0, 0, -4.0, 0, 0, 7.0, 0, 5.0]]


@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_dare_is_its_mask_and_its_factor(rescale: str) -> None:
    updates = random_updates(3, 40, 50)
    found = sparse("dare", updates, density=0.3, rescale=rescale)
    for one, kept, name in zip(updates, found, NAMES, strict=True):
        mask = torch.rand(40, 50, generator=generator(0, "x", name)) < 0.3
        assert torch.equal(kept != 0, mask)
        factor = {"inverse": 1 / 0.3, "l1": one.abs().sum() / one[mask].abs().sum(), "none": 1.0}
        assert relative(kept, one * mask * factor[rescale]) < 1e-12
        assert abs(mask.double().mean() - 0.3) < 5 * (0.3 * 0.7 / 2000) ** 0.5


@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_della_is_its_mask_and_its_factors(rescale: str) -> None:
    updates = random_updates(2, 4, 7)
    found = sparse("della", updates, density=0.4, epsilon=0.15, rescale=rescale)
    for one, kept, name in zip(updates, found, NAMES, strict=False):
        drawn = torch.rand(4, 7, generator=generator(0, "x", name))
        expected = torch.zeros_like(one)
        for row in range(4):
            order = sorted(range(7), key=lambda c, row=row, one=one: abs(float(one[row, c])))
            for rank, column in enumerate(order):
                chance = 0.4 - 0.15 + 0.3 * rank / 6
                if drawn[row, column] < chance:
                    expected[row, column] = one[row, column] / (
                        chance if rescale == "inverse" else 1
                    )
        if rescale == "l1":
            expected *= one.abs().sum() / expected.abs().sum()
        assert relative(kept, expected) < 1e-6


def test_della_keeps_each_rank_as_often_as_mergekit() -> None:
    from mergekit.sparsify import della_magprune

    rows = torch.tensor([[0.1, -3.0, 2.0, 0.5]], dtype=torch.float64).expand(20000, 4).clone()
    ours = sparse("della", rows[None], density=0.5, epsilon=0.3, rescale="none")[0]
    torch.manual_seed(0)
    theirs = della_magprune(rows, 0.5, 0.3)
    shares = torch.tensor([0.2, 0.8, 0.6, 0.4]).double()
    for kept in (ours, theirs):
        assert ((kept != 0).double().mean(0) - shares).abs().max() < 5 * (0.25 / 20000) ** 0.5
    whole = sparse("della", rows[None], density=0.5, epsilon=0.3)[0]
    assert (whole.mean(0) / rows[0] - 1).abs().max() < 0.05


def test_della_on_edges() -> None:
    updates = random_updates(2, 5, 1)
    assert sparse("della", updates, density=0.5).shape == updates.shape
    assert torch.equal(sparse("della", updates, density=1.0), updates)
    assert not sparse("della", updates, density=0.0).any()
    with pytest.raises(UserError, match=r"density=0\.05 and merge\.epsilon=0\.1"):
        make_mix(complete("linear", {"sparsify": "della", "density": 0.05}))
    with pytest.raises(UserError, match=r"merge\.scope=tensor"):
        list(mix("linear", sparsify="della", scope="brick").groups([("a", "a"), ("b", "b")]))


@pytest.mark.parametrize("agree", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("threshold", [0.2, 0.6, 1.0])
def test_tall_masks_number_by_number(agree: int | None, threshold: float) -> None:
    updates = random_updates(3, 4, 5, seed=3)
    found = sparse("tall", updates, threshold=threshold, agree=agree)
    for row in range(4):
        for column in range(5):
            numbers = [float(x) for x in updates[:, row, column]]
            total = sum(numbers)
            uses = [abs(x) > threshold * abs(total - x) for x in numbers]
            kept = uses if agree is None else [sum(uses) >= agree] * 3
            expected = [x if k else 0.0 for x, k in zip(numbers, kept, strict=True)]
            assert found[:, row, column].tolist() == expected


@pytest.mark.parametrize("name", ["magnitude", "dare", "breadcrumbs", "della"])
def test_density_one_drops_nothing(name: str) -> None:
    updates = random_updates(3, 4, 5)
    given = {"gamma": 0.1} if name == "breadcrumbs" else {}
    assert torch.equal(sparse(name, updates, density=1.0, **given), updates)


@pytest.mark.parametrize("name", ["dare", "della"])
def test_draws_depend_on_seed_entry_and_input_alone(name: str) -> None:
    updates = random_updates(3, 4, 5)
    chosen = mix("linear", sparsify=name, seed=5)
    weights = torch.tensor([0.2, 0.3, 0.5]).double()
    forth = chosen.merge_updates(updates, weights, "x", NAMES)
    back = chosen.merge_updates(updates.flip(0), weights.flip(0), "x", NAMES[::-1])
    assert relative(back, forth) < 1e-14
    again = chosen.merge_updates(updates, weights, "x", NAMES)
    other = chosen.merge_updates(updates, weights, "y", NAMES)
    assert torch.equal(again, forth) and not torch.equal(other, forth)
    assert not torch.equal(
        mix("linear", sparsify=name, seed=6).merge_updates(updates, weights, "x", NAMES), forth
    )
