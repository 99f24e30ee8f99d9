"""Concatenated prompts: the first brick's virtual tokens, then the second's, then the text.

    soft prompts    [p₁; p₂; …; tokens]                 before the embeddings of one stack
    prefixes        [K₁; K₂; …; K], [V₁; V₂; …; V]      before keys and values of every attention

The total length is the sum of the lengths, and real tokens move up by it where a prefix moves them
at all. All bricks must be of one kind and on the same sites, so that there is one order and one
length. Order matters wherever tokens have positions.
"""

from __future__ import annotations

from cfm_train.stitching.mode import Mode


class Prompt(Mode):
    """Virtual tokens one after the other."""

    everywhere = True
    tokens = True
    meets = (frozenset({"tokens"}),)
    side_by_side = frozenset({"tokens"})
