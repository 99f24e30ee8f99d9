"""Entities in BIO tags, read as ``conlleval`` reads them (Tjong Kim Sang & De Meulder, 2003).

``B-X`` starts an entity; ``I-X`` goes on with an entity of its own type, and starts one where there
is none to go on with. A prediction counts only when its type and both of its ends are right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: (first token, token after the last, type)
Span = tuple[int, int, str]


def entity_spans(tags: Sequence[str]) -> list[Span]:
    """The entities of a sequence of BIO tags.

    Args:
        tags: one tag per token.

    Returns:
        The spans from left to right.
    """
    spans: list[Span] = []
    start, kind = 0, ""
    for at, tag in enumerate([*tags, "O"]):
        goes_on = tag == f"I-{kind}" and kind != ""
        if kind and not goes_on:
            spans.append((start, at, kind))
            kind = ""
        if tag != "O" and not goes_on:
            start, kind = at, tag[2:]
    return spans


def entity_counts(
    predicted: np.ndarray, wanted: np.ndarray, labels: Sequence[str]
) -> tuple[int, int]:
    """What one row adds to entity F1 = 2 found / (predicted + wanted).

    Args:
        predicted: class ids, int [tokens].
        wanted: class ids, int [tokens].
        labels: BIO names by id.

    Returns:
        How many entities were found exactly, and how many there are on both sides together.
    """
    said = set(entity_spans([labels[i] for i in predicted]))
    right = set(entity_spans([labels[i] for i in wanted]))
    return len(said & right), len(said) + len(right)
