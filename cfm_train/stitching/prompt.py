"""Concatenated prompts: the first brick's virtual tokens, then the second's, then the text.

    soft prompts    [p₁; p₂; …; tokens]                 before the embeddings of one stack
    prefixes        [K₁; K₂; …; K], [V₁; V₂; …; V]      before keys and values of every attention
    both            prefixes, then soft prompts, then the text

The total length is the sum of the lengths, and real tokens move up by it where a prefix moves them
at all. Prefixes must be on the same sites, so that there is one order and one length. A prefix is
what every layer sees before all that runs through the layers, a soft prompt's tokens included, so
it stands in front wherever it is named: order counts among soft prompts and among prefixes, as far
as tokens have positions or see only what is before them.
"""

from __future__ import annotations

from cfm_train.stitching.mode import Mode


class Prompt(Mode):
    """Virtual tokens one after the other."""

    tokens = True
    meets = (frozenset({"tokens"}), frozenset({"keys"}))
    side_by_side = frozenset({"tokens", "keys"})
