"""CIDEr-D against its formula, written out as the paper has it."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from cfm_train.evaluation.cider import cider

REFERENCES = [
    ["a man rides a horse", "a person on a brown horse", "the man rides the horse in a field"],
    ["two dogs play with a red ball", "dogs are playing in the grass"],
    ["a plate of food on a table", "a table with a plate of food and a cup"],
    ["a man and two dogs on a table"],
]
SAID = ["a man rides a horse", "a man rides a horse", "a plate with food", ""]


def by_formula(said: list[str], references: list[list[str]]) -> list[float]:
    """Vectors over all n-grams that occur anywhere, one entry at a time."""

    def grams(text: str, n: int) -> list[tuple[str, ...]]:
        words = text.split()
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    scores = []
    for candidate, own in zip(said, references, strict=True):
        total = 0.0
        for n in (1, 2, 3, 4):
            known = sorted({g for texts in [*references, said] for t in texts for g in grams(t, n)})

            def vector(text: str, known: list[tuple[str, ...]] = known, n: int = n) -> list[float]:
                found = []
                for gram in known:
                    holds = sum(any(gram in grams(t, n) for t in texts) for texts in references)
                    idf = math.log(len(references) / max(1, holds))
                    found.append(grams(text, n).count(gram) * idf)
                return found

            for text in own:
                a, b = vector(candidate), vector(text)
                lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
                clipped = sum(min(x, y) * y for x, y in zip(a, b, strict=True))
                apart = len(candidate.split()) - len(text.split())
                penalty = math.exp(-(apart**2) / (2 * 6.0**2))
                total += penalty * (clipped / lengths if lengths else 0.0) / len(own) / 4
        scores.append(10 * total)
    return scores


def test_values_are_the_formulas() -> None:
    found = cider(SAID, REFERENCES)
    np.testing.assert_allclose(found, by_formula(SAID, REFERENCES), rtol=1e-12)
    assert found[0] > found[2] > 0 and found[3] == 0
    draw = random.Random(0)
    words = ["a", "dog", "cat", "on", "the", "mat", "red"]

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 9)))

    said = [text() for _ in range(6)]
    references = [[text() for _ in range(draw.randint(1, 3))] for _ in range(6)]
    np.testing.assert_allclose(cider(said, references), by_formula(said, references), rtol=1e-12)


def test_the_only_reference_again_scores_ten_and_case_and_points_are_nothing() -> None:
    references = [["The man's dog runs fast."], ["A bowl of green soup."]]
    found = cider(["the MAN'S dog, runs fast", "a bowl of green soup"], references)
    np.testing.assert_allclose(found, [10, 10])


def test_what_stands_in_every_item_weighs_nothing() -> None:
    assert cider(["a cat"], [["a cat"]]).tolist() == [0.0]
    assert cider(["a", "a"], [["a b"], ["a c"]]).tolist() == [0.0, 0.0]


def test_lengths_that_differ_and_items_without_references_are_refused() -> None:
    for said, references in ((["a"], []), (["a"], [[]])):
        with pytest.raises(ValueError, match="one caption for each item"):
            cider(said, references)
