"""Which passage fits a text best: BM25 (Robertson and Zaragoza 2009) over lower-cased words.

score = Σ_w idf(w) · f (k + 1) / (f + k (1 − b + b · length / mean length))     k = 1.5, b = 0.75
idf(w) = log(1 + (N − n_w + ½) / (n_w + ½))
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

K, B = 1.5, 0.75


def words(text: str) -> list[str]:
    """The words of a text in small letters."""
    return re.findall(r"\w+", text.lower())


class Index:
    """Passages to be found by what they say.

    Args:
        texts: the passages; at least one.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(words(text)) for text in texts]
        self.lengths = [count.total() for count in counts]
        self.mean = max(1.0, sum(self.lengths) / len(counts))
        self.found: dict[str, list[tuple[int, int]]] = {}
        for number, count in enumerate(counts):
            for word, times in count.items():
                self.found.setdefault(word, []).append((number, times))

    def scores(self, text: str) -> dict[int, float]:
        """The score of each passage that shares a word with a text."""
        scores: dict[int, float] = {}
        total = len(self.lengths)
        for word in dict.fromkeys(words(text)):
            there = self.found.get(word, [])
            idf = math.log(1 + (total - len(there) + 0.5) / (len(there) + 0.5))
            for number, f in there:
                norm = 1 - B + B * self.lengths[number] / self.mean
                scores[number] = scores.get(number, 0.0) + idf * f * (K + 1) / (f + K * norm)
        return scores

    def best(self, text: str) -> int:
        """The number of the best passage; the first of equals, and where none shares a word."""
        scores = self.scores(text)
        return min(scores, key=lambda number: (-scores[number], number)) if scores else 0
