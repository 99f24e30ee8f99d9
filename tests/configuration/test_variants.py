"""Configurations beside each other: stored merges written out, curves, families of seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from cfm_train.configuration.parser import parse
from cfm_train.configuration.pin import pin
from cfm_train.configuration.variants import (
    curves,
    opened,
    seed_families,
    short,
    tuned_families,
    without_versions,
)
from cfm_train.library.card import Card
from cfm_train.library.store import Library


def add(library: Library, name: str, value: int, **known: object) -> Card:
    content = save({"a": np.random.default_rng(value).normal(size=3).astype(np.float32)})
    return library.add({"brick.safetensors": content}, Card(name=name, kind="lora", **known))  # type: ignore[arg-type]


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """a and b with two seeds each, c of unknown origin, and a stored merge of a and b."""
    library = Library(tmp_path / "library")
    for at, name in enumerate("ab"):
        for seed in (1, 2):
            recipe = {"seed": seed, "name": name, "rank": at, "outputs": f"out{seed}"}
            add(library, name, 10 * at + seed, operation="train", recipe=recipe)
    add(library, "c", 99, operation="add")
    tree = pin(parse("merge(ties, [a, b], density=0.3)"), library)
    parents = [{"name": n, "version": library.find(n).version} for n in "ab"]
    add(library, "both", 7, operation="merge", expression=str(tree), parents=parents)
    return library


def trees(library: Library, *texts: str) -> dict:
    return {text: opened(pin(parse(text), library), library) for text in texts}


def test_a_stored_merge_is_its_configuration(library: Library) -> None:
    found = trees(library, "both", "merge(ties, [a, b], density=0.3)", "stitch([both, c])", "a")
    first, same, nested, plain = found.values()
    assert first == same and str(first) in str(nested)
    assert str(plain) == library.find("a").ref
    assert short(nested) == "stitch([merge(ties, [a, b], density=0.3), c], mode=chain)"


def test_curves_go_through_what_differs_in_one_number_alone(library: Library) -> None:
    """A grid of two λ by two densities, one of them stored: two curves over each."""
    grid = [f"merge(ties, [a, b], density={d}, scale={s})" for d in (0.3, 0.6) for s in (0.5, 2.0)]
    other = ["merge(ties, [b, a], scale=0.5)", "merge(linear, [a, b], weights=[0.1, 0.9])", "c"]
    found = trees(library, *grid, "both", *other)
    assert tuned_families(found) == [[*grid, "both"]]
    lines = {(c.parameter, c.family): c.points for c in curves(found)}
    assert lines == {
        ("scale", "merge(ties, [a, b], scale=*, density=0.3)"):
            ((0.5, grid[0]), (1.0, "both"), (2.0, grid[1])),
        ("scale", "merge(ties, [a, b], scale=*, density=0.6)"): ((0.5, grid[2]), (2.0, grid[3])),
        ("density", "merge(ties, [a, b], scale=0.5, density=*)"): ((0.3, grid[0]), (0.6, grid[2])),
        ("density", "merge(ties, [a, b], scale=2, density=*)"): ((0.3, grid[1]), (0.6, grid[3])),
    }  # fmt: skip


def test_weights_are_a_curve_where_they_come_to_one_number(library: Library) -> None:
    halves = [f"merge(linear, [a, b], weights=[{w}, {1 - w}])" for w in (0.25, 0.5, 0.75)]
    (line,) = curves(trees(library, *halves))
    assert line.name == "weight of the first brick"
    assert line.points == tuple(zip((0.25, 0.5, 0.75), halves, strict=True))
    equal = [f"merge(linear, [a, b, c], weights=[{w}, {w}, {w}])" for w in (0.2, 0.4)]
    (line,) = curves(trees(library, *equal))
    assert (line.name, [x for x, _ in line.points]) == ("weight of each brick", [0.2, 0.4])
    mixed = [f"merge(linear, [a, b, c], weights=[{w}, 0.1, 0.3])" for w in (0.2, 0.4)]
    assert curves(trees(library, *mixed)) == [] and len(tuned_families(trees(library, *mixed))) == 1


def test_a_number_deep_inside_is_found(library: Library) -> None:
    texts = [f"stitch([c, merge(ties, [a, b], scale={s})])" for s in (0.5, 1.5)]
    (line,) = curves(trees(library, *texts))
    assert line.family == "stitch([c, merge(ties, [a, b], scale=*, density=0.2)], mode=chain)"


def test_bricks_that_differ_by_their_seed_alone_are_one_family(library: Library) -> None:
    one, two = (f"a@{v}" for v in library.versions("a"))
    three, four = (f"b@{v}" for v in library.versions("b"))
    assert seed_families(trees(library, one, two, three, "c"), library) == [[one, two]]
    merges = [f"merge(linear, [{one}, {three}])", f"merge(linear, [{two}, {four}])"]
    assert seed_families(trees(library, *merges, one), library) == [merges]
    assert {without_versions(text) for text in merges} == {"merge(linear, [a, b])"}
    tuned = [f"merge(ties, [{one}, {three}], scale=0.5)", f"merge(ties, [{two}, {four}])"]
    assert seed_families(trees(library, *tuned), library) == []
    assert seed_families(trees(library, *tuned), library, tuned) == [tuned]
    assert seed_families(trees(library, "a", two), library) == [], "the same version twice"
