"""Whether the order of a stitch matters: each against its opposite order, on its own tasks.

effect       max |a∘b − b∘a| / max |a∘b − bare| on a probe (`stitching.promises`)
difference   score of a∘b − score of b∘a on the same rows, paired; above 0: as given is better
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cfm_train.configuration.expression import Call
from cfm_train.configuration.pin import with_defaults
from cfm_train.configuration.variants import short
from cfm_train.evaluation.examples import Examples, advantage
from cfm_train.evaluation.matrix import row
from cfm_train.evaluation.scorer import Body
from cfm_train.operations.stitched import probe_of
from cfm_train.stitching.mode import mode_of

if TYPE_CHECKING:
    from cfm_train.operations.compared import Compared


def order_effects(compared: Compared) -> list[dict[str, Any]]:
    """The order effects of all rows that are stitches of two or more, in a mode that has an order.

    Args:
        compared: the rows.
    """
    found = []
    for body in compared.shown():
        tree = compared.inputs.trees[body.label]
        if not isinstance(tree, Call) or tree.fn != "stitch" or len(tree.args) < 2:
            continue
        if not mode_of(str(dict(with_defaults(tree).params)["mode"])).ordered:
            continue
        turned = replace(tree, args=tree.args[::-1])
        label = short(turned)
        back = compared.scene.body(label, turned, compared.inputs.selection)
        found.append(
            {
                "row": body.label,
                "reverse": label,
                "effect": _effect(compared, body, back),
                "tasks": _on_tasks(compared, body, back),
            }
        )
    return found


def _on_tasks(compared: Compared, body: Body, back: Body) -> list[dict[str, Any]]:
    scorer, tasks = compared.scorer, compared.own(body.label) or compared.ranked_tasks
    given = [compared.rows[body.label][compared.tasks.index(task)] for task in tasks]
    reverse = row(scorer, back, tasks, compared.scene.heads)
    return [
        {
            "task": a.spec.name,
            "metric": a.metric,
            "given": a.scores[a.metric].as_dict(),
            "reverse": b.scores[a.metric].as_dict(),
            "difference": advantage(
                a.examples, b.examples, a.metric, bootstrap=compared.bootstrap, seed=scorer.seed
            ).as_dict(),
        }
        for a, b in zip(given, reverse, strict=True)
    ]


def _effect(compared: Compared, body: Body, back: Body) -> dict[str, Any]:
    """The effect on a probe; kept on the shelf as an evaluation is."""
    scorer = compared.scorer
    task = next(iter(scorer.tasks))
    about = f"order effect {scorer.key(body, task, None, 'train')} {back.identity}"
    key = hashlib.sha256(about.encode()).hexdigest()
    held = scorer.shelf.find(key, None)
    if held is None:
        probe = probe_of(compared.scene.backbone, scorer.tasks)
        assert body.brick is not None and back.brick is not None
        forth, turned, bare = probe.ask(body.brick), probe.ask(back.brick), probe.ask()
        change = (forth - bare).abs().max().item()
        value = (forth - turned).abs().max().item() / change if change else 0.0
        examples = Examples({"order": np.array([[value, probe.tokens]])}, None)
        scorer.shelf.keep(key, examples)
        held = examples, None
    value, tokens = held[0].parts["order"][0]
    return {"value": float(value), "low": float(value), "high": float(value), "n": int(tokens)}
