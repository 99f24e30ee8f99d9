"""A comparison as the record holds it: rows, groups, averages, the winner, curves, and reasons."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cfm_train.configuration.expression import bricks
from cfm_train.configuration.variants import curves, short
from cfm_train.data.tasks import GENERATIVE
from cfm_train.evaluation.examples import advantage
from cfm_train.evaluation.scorer import BARE, TrainedOn
from cfm_train.evaluation.similarity import similarity
from cfm_train.library.card import STITCH, Card
from cfm_train.operations.ancestry import ancestry, part
from cfm_train.operations.order import order_effects

if TYPE_CHECKING:
    from cfm_train.operations.compared import Compared

Json = dict[str, Any]


def comparison(compared: Compared) -> Json:
    """The ``comparison`` of the record, but for what was reused.

    Args:
        compared: the rows.
    """
    ranking, grouped = (
        compared.ranking,
        {x for members in compared.groups.values() for x in members},
    )
    rivals = {x: [x] for x in compared.rows if compared.competes(x) and x not in grouped}
    means, normalised = ranking.means(), ranking.normalised()
    return {
        "tasks": compared.ranked_tasks,
        "test_sets": len(ranking.groups),
        "individuals": compared.individuals,
        "unrelated": compared.unrelated,
        "rows": [
            {
                **_row(compared, label),
                "competes": compared.competes(label),
                "mean": means.get(label),
                "normalised": normalised.get(label),
            }
            for label in compared.rows
        ],
        "groups": [
            {
                "label": label,
                "members": members,
                "mean": ranking.figure_of(members, normalised=False),
                "normalised": ranking.figure_of(members, normalised=True),
            }
            for label, members in compared.groups.items()
        ],
        "winner": ranking.winner(rivals | compared.groups),
        "curves": _curves(compared),
        "similarity": _similarity(compared),
        "orders": order_effects(compared),
        "forgetting": [*_forgetting(compared)],
        "lineage": ancestry(compared),
    }


def _row(compared: Compared, label: str) -> Json:
    if label == BARE.label:
        empty = dict.fromkeys(("brick", "chosen_on", "parameters", "bytes", "seconds"))
        named = {"label": label, "short": label, "expression": label, "role": "floor"}
        return {**named, **empty, "seconds_of": None, "parts": []}
    body, selection = compared.bodies[label], compared.inputs.selection
    tree = selection.trees[selection.labels.index(label)]
    card = selection.card_of(tree)
    assert body.brick is not None
    tensors = list(body.brick.parameters())
    seconds, what = _seconds(compared, label, card)
    refs = dict.fromkeys(str(ref) for ref in bricks(compared.inputs.trees[label]))
    return {
        "label": label,
        "short": card.name if card else short(tree),
        "expression": str(compared.inputs.trees[label]),
        "role": body.role,
        "brick": None if card is None else part(compared, card),
        "parts": [part(compared, compared.library.find(ref)) for ref in refs],
        "chosen_on": "validation" if label in compared.chosen else None,
        "parameters": sum(p.numel() for p in tensors),
        "bytes": sum(p.numel() * p.element_size() for p in tensors),
        "seconds": seconds,
        "seconds_of": what,
    }


def _seconds(compared: Compared, label: str, card: Card | None) -> tuple[float | None, str | None]:
    """What making a row took, and which part of making it that is."""
    if card is None:
        return compared.scene.seconds[label], "assembly"
    cost = compared.records.get(card.run, {}).get("cost")
    if cost is None:
        return None, None
    if cost["train_seconds"] is not None:
        return cost["train_seconds"], "training"
    return cost["seconds"], "run"


def _curves(compared: Compared) -> list[Json]:
    """Curves on the test rows of the tasks that their bricks were trained on, which chose."""
    found = []
    for curve in curves(compared.inputs.trees):
        labels = [label for _, label in curve.points]
        tasks = compared.own(labels[0]) or compared.ranked_tasks
        means = compared.ranked({label: compared.rows[label] for label in labels}, tasks).means()
        points = [
            {
                "x": x,
                "row": label,
                "mean": means.get(label),
                "validation": compared.validation.get(label) if means else None,
                "chosen": label in compared.chosen,
            }
            for x, label in curve.points
        ]
        found.append({
            "parameter": curve.parameter, "name": curve.name, "family": curve.family,
            "tasks": tasks, "points": points,
        })  # fmt: skip
    return found


def _similarity(compared: Compared) -> Json | None:
    found = {
        body.label: body.brick for body in compared.shown()
        if body.brick is not None and body.brick.kind != STITCH and body.brick.tensors()
    }  # fmt: skip
    if len(found) < 2:
        return None
    told = similarity(found)
    pairs = [{k: v for k, v in pair.items() if k != "layers"} for pair in told["pairs"]]
    return {"labels": told["labels"], "pairs": pairs}


def _forgetting(compared: Compared) -> Iterator[Json]:
    """Every row on every task that none of its bricks was trained on, by the same head."""
    for body in compared.shown():
        for task in compared.tasks:
            if task in compared.own(body.label):
                continue
            spec = compared.scorer.tasks[task].spec
            head = None if spec.type in GENERATIVE else TrainedOn(BARE)
            of = None if head is None else BARE.label
            bare = compared.scorer.score(BARE, task, head, of=of)
            plugged = compared.scorer.score(body, task, head, of=of)
            metric = "perplexity" if "perplexity" in bare.scores else bare.metric
            change = advantage(
                plugged.examples,
                bare.examples,
                metric,
                bootstrap=compared.bootstrap,
                seed=compared.scorer.seed,
            )
            yield {
                "row": body.label,
                "task": task,
                "metric": metric,
                "bare": bare.scores[metric].as_dict(),
                "with_brick": plugged.scores[metric].as_dict(),
                "change": change.as_dict(),
            }


def lines(compared: Compared, comparison: Json) -> Iterator[str]:
    """What a person reads in the terminal besides the matrix.

    Args:
        compared: the rows.
        comparison: the ``comparison`` of the record.
    """
    for label in compared.chosen:
        yield f"chosen on validation rows: {label}"
    if winner := comparison["winner"]:
        margin = winner["margin"]
        verdict = "" if winner["clear"] else "; the interval holds 0, so that may be chance"
        yield (
            f"best: {winner['label']}, ahead of {winner['runner_up']} by "
            f"{margin['value']:.4f} [{margin['low']:.4f}, {margin['high']:.4f}] "
            f"({winner['by']} of {len(comparison['tasks'])} tasks; {winner['method']}){verdict}"
        )
    reused = comparison["reused"]
    yield f"{reused['found']} evaluations from earlier records, {reused['made']} made here"
