"""Scores of one generated text against its reference: exact match, ROUGE-L, token F1.

Words are runs of Unicode letters and digits in lower case, so that any language can be scored; on
English text this is what the usual packages do.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter

_WORD = re.compile(r"[^\W_]+")
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def exact_match(said: str, right: str) -> float:
    """1 where the texts are equal up to white space and Unicode normal form, else 0."""
    return float(_plain(said) == _plain(right))


def rouge_l(said: str, right: str) -> float:
    """ROUGE-L F1 (Lin, 2004): ``2 LCS / (words said + words right)``; 0 where a side has none."""
    a, b = _WORD.findall(said.lower()), _WORD.findall(right.lower())
    if not a or not b:
        return 0.0
    return 2 * _longest_common_subsequence(a, b) / (len(a) + len(b))


def token_f1(said: str, right: str) -> float:
    """SQuAD's F1 over the bag of words (Rajpurkar et al., 2016), without articles and punctuation.

    Where a side has no words left it is 1 if the other has none either, else 0.
    """
    a, b = _squad_words(said), _squad_words(right)
    if not a or not b:
        return float(a == b)
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _squad_words(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return _ARTICLE.sub(" ", kept).split()


def _longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, in O(len(a) · len(b)) time and O(len(b)) memory."""
    best = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for at, other in enumerate(b, start=1):
            diagonal, best[at] = (
                best[at],
                (diagonal + 1 if word == other else max(best[at], best[at - 1])),
            )
    return best[-1]
