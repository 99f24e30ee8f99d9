"""CIDEr-D: how well a caption agrees with what several people wrote (Vedantam et al. 2015).

    g(s)     tf-idf of a caption's n-grams: count · (log items − log document frequency)
    score    10 · mean over n = 1…4, mean over references:
             min(g(said), g(right)) · g(right) / (|g(said)| · |g(right)|) · exp(−(Δ words)² / 2σ²)

The document frequency of an n-gram is the number of items with a reference that holds it, at least
one; σ is 6. What stands in every item's references (and everything, where there is one item) weighs
nothing. Words are runs of letters and digits in lower case, an apostrophe inside a word included:
the paper's tokeniser (Penn Treebank's) parts ``don't`` in two and needs Java, so figures are near
those of coco-caption and not equal to them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

#: Longest n-grams, and the deviation of the penalty for other lengths, in words.
LONGEST, SIGMA = 4, 6.0

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")

Grams = Counter[tuple[str, ...]]


def cider(said: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D of each caption; the score of a system is the mean.

    Args:
        said: one caption for each item.
        references: what people wrote of each item, one at least.

    Returns:
        float64 ``[items]``, from 0 to 10.

    Raises:
        ValueError: the lengths differ, or an item has no reference.
    """
    if len(said) != len(references) or not all(len(texts) for texts in references):
        raise ValueError("CIDEr needs one caption for each item, and a reference for each at least")
    grams = [[_grams(text) for text in texts] for texts in references]
    frequency: Counter[tuple[str, ...]] = Counter()
    for texts in grams:
        frequency.update({gram for one in texts for gram in one})
    items = np.log(len(said))
    weight = {gram: float(items - np.log(count)) for gram, count in frequency.items()}
    scores = np.zeros(len(said))
    for i, (text, texts) in enumerate(zip(said, grams, strict=True)):
        own = _grams(text)
        scores[i] = np.mean([_similarity(own, one, weight, float(items)) for one in texts])
    return 10 * scores


def _grams(text: str) -> Grams:
    """How often each n-gram occurs."""
    words = _WORD.findall(text.lower())
    return Counter(
        tuple(words[at : at + n]) for n in range(1, LONGEST + 1) for at in range(len(words) - n + 1)
    )


def _similarity(
    said: Grams, right: Grams, weight: dict[tuple[str, ...], float], unknown: float
) -> float:
    """Of one caption and one reference, mean over n; n-grams of no reference weigh ``unknown``."""
    shared = np.zeros(LONGEST)
    squares = np.zeros((2, LONGEST))
    for side, grams in enumerate((said, right)):
        for gram, count in grams.items():
            squares[side, len(gram) - 1] += (count * weight.get(gram, unknown)) ** 2
    for gram in said.keys() & right.keys():
        least = min(said[gram], right[gram])
        shared[len(gram) - 1] += least * right[gram] * weight[gram] ** 2
    norms = np.sqrt(squares[0] * squares[1])
    apart = _words(said) - _words(right)
    cosines = np.divide(shared, norms, out=np.zeros(LONGEST), where=norms > 0)
    return float(cosines.mean() * np.exp(-(apart**2) / (2 * SIGMA**2)))


def _words(grams: Grams) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 1)
