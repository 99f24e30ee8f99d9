"""Model Stock: how far to go to the mean is read off the angle between the updates (Jang et al.
2024, arXiv 2403.19522).

    τ = t/N Σ τᵢ        t = N cosθ / (1 + (N-1) cosθ)

Updates that point the same way are averaged (t = 1); orthogonal ones tell nothing in common and
stay at the backbone (t = 0). ``cosθ`` is the mean over all pairs, which for more than two inputs
the paper leaves open; so does mergekit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfm_train.merging import sphere
from cfm_train.merging.rule import Facts, Rule


class ModelStock(Rule):
    """The mean times a ratio from the angles; each update is one vector. It takes no weights."""

    weightless = True
    fewest = 2
    promises = frozenset({"permutation", "idempotent", "off"})

    def combine(self, updates: Tensor, weights: Tensor, facts: Facts) -> Tensor:
        """See the class; an update of zeros counts as orthogonal to all."""
        count = len(updates)
        _, cosines = sphere.directions(updates)
        above = torch.triu_indices(count, count, offset=1)
        cosine = cosines[above[0], above[1]].mean()
        below = 1 + (count - 1) * cosine
        # Where the denominator vanishes the updates cancel: nothing is known, nothing is changed.
        ratio = count * cosine / below if below.abs() > 1e-6 else torch.zeros(())
        return sphere.add_up(updates, (ratio / count).expand(count))
