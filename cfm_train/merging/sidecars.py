"""The statistics that a rule needs, found beside the bricks in the library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cfm_train.config import signature
from cfm_train.configuration.expression import BrickRef, Expression
from cfm_train.errors import UserError
from cfm_train.library.card import Card
from cfm_train.library.sidecar import Sidecar, find_sidecars
from cfm_train.library.store import Library

if TYPE_CHECKING:
    from torch import Tensor

    from cfm_train.merging.engine import Statistics

#: What the sidecar of a statistic says about itself, beside its tensors.
FACTS = "{kind}.json"
TENSORS = "{kind}.safetensors"


def needed_by(rule: str) -> str | None:
    """The statistics a rule needs, from its source; None for none."""
    found = signature.constants("merging", rule, "Rule").get("needs")
    return None if found is None else str(found)


def find(
    kind: str, trees: Sequence[Expression], cards: Mapping[str, Card], library: Library
) -> list[Sidecar]:
    """The sidecar of each brick of a merge: of several that of the most rows.

    Raises:
        UserError: a brick has none, or one of the merged is no single brick.
    """
    found = []
    missing = []
    for tree in trees:
        if not isinstance(tree, BrickRef):
            raise UserError(
                f"'{tree}' has no {kind} statistics of its own: store it under a name, and run "
                f"recipe=analyze/{kind} on it."
            )
        card = cards[str(tree)]
        sidecars = find_sidecars(library, card, TENSORS.format(kind=kind))
        if sidecars:
            found.append(max(sidecars, key=lambda one: (facts(one, kind)["rows"], one.folder)))
        else:
            missing.append(card.name)
    if missing:
        raise UserError(
            f"{', '.join(missing)} {'has' if len(missing) == 1 else 'have'} no {kind} statistics: "
            f"run recipe=analyze/{kind} bricks=[{','.join(t.name for t in trees)}] first."  # type: ignore[union-attr]
        )
    return found


def facts(sidecar: Sidecar, kind: str) -> dict[str, Any]:
    """What a statistic was gathered from: rows, seed, task and sites."""
    content = sidecar.read(FACTS.format(kind=kind))
    return dict(json.loads(content)) if content else {"rows": 0}


def fingerprint(sidecar: Sidecar, kind: str) -> str:
    """SHA-256 of a sidecar's tensors, for the config hash."""
    return hashlib.sha256(sidecar.read(TENSORS.format(kind=kind)) or b"").hexdigest()


def read(sidecars: Sequence[Sidecar], kind: str) -> Statistics:
    """The statistics of every brick, by site.

    Args:
        sidecars: one for each brick, in the order of the merge.
        kind: ``gram`` or ``fisher``.

    Returns:
        A function from a site's name to one tensor for each brick; it raises `UserError` where a
        brick's statistics lack the site.
    """
    from safetensors.torch import load

    loaded = [load(sidecar.read(TENSORS.format(kind=kind)) or b"") for sidecar in sidecars]

    def of(site: str) -> list[Tensor]:
        for sidecar, tensors in zip(sidecars, loaded, strict=True):
            if site not in tensors:
                raise UserError(
                    f"{sidecar.about} has no {kind} statistics of site '{site}', which another of "
                    f"the bricks changes: run recipe=analyze/{kind} with all of the bricks at once."
                )
        return [tensors[site] for tensors in loaded]

    return of
