"""Where a subject stands among token ids."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from typing import Any

from cfm_train.data.facts import normalised


def mentioned(tokenizer: Any, ids: Sequence[int], subject: str) -> list[tuple[int, int]]:
    """The first and the last token of each mention of a subject, as whole words.

    Told from the texts that the first 1, 2, … tokens stand for, so any tokenizer will do, and a
    mention is where it is whatever follows.

    Args:
        tokenizer: the backbone's.
        ids: token ids; special tokens stand for no text.
        subject: the subject.
    """

    def begin(count: int) -> int:
        """How many characters the first tokens stand for."""
        return len(normalised(tokenizer.decode(ids[:count], skip_special_tokens=True)))

    text = normalised(tokenizer.decode(ids, skip_special_tokens=True))
    subject = normalised(subject)
    if subject not in text:
        return []
    counts = range(1, len(ids) + 1)
    return [
        (
            bisect.bisect_right(counts, match.start(), key=begin),
            bisect.bisect_left(counts, match.end(), key=begin),
        )
        for match in re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", text)
    ]
