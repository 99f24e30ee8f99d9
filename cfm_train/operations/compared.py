"""What a comparison comes to, beyond its matrix: choices, averages, margins, and the reasons.

Everything is made of evaluations by one scorer, so that each is asked once and none that an earlier
record holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.configuration.expression import BrickRef, Call, Expression, bricks
from cfm_train.configuration.parser import parse
from cfm_train.configuration.variants import (
    MADE,
    curves,
    seed_families,
    short,
    tuned_families,
    without_versions,
)
from cfm_train.data.tasks import GENERATIVE, LOWER_IS_BETTER
from cfm_train.errors import UserError
from cfm_train.evaluation.examples import advantage
from cfm_train.evaluation.matrix import row
from cfm_train.evaluation.ranking import Ranking
from cfm_train.evaluation.scorer import BARE, Body, Scored, TrainedOn
from cfm_train.evaluation.similarity import similarity
from cfm_train.library.card import STITCH, Card
from cfm_train.operations.order import order_effects

if TYPE_CHECKING:
    from cfm_train.operations.compare import Inputs
    from cfm_train.operations.scene import Scene

Json = dict[str, Any]

#: The roles of rows that can win.
RIVALS = ("brick", "merged")


class Compared:
    """Rows that have been scored, and what follows from them.

    Args:
        scene: backbone, bodies and scorer.
        inputs: what the run's ``check`` found.
        rows: each row's scores on every task, in the order of the tasks; bodies and the floor.
        made_by: records of the runs that made the bricks.
    """

    def __init__(
        self,
        scene: Scene,
        inputs: Inputs,
        rows: Mapping[str, Sequence[Scored]],
        made_by: Sequence[Path],
    ) -> None:
        self.scene, self.inputs, self.rows = scene, inputs, rows
        self.scorer, self.tasks = scene.scorer, list(inputs.tasks)
        self.bodies: dict[str, Body] = {body.label: body for body in scene.bodies}
        self.records = {path.parent.name: json.loads(path.read_text("utf-8")) for path in made_by}
        self.bootstrap = max(1, self.scorer.evaluation["bootstrap"])

    # -- which tasks and rows count ----------------------------------------------------------------

    def own(self, label: str) -> list[str]:
        """The tasks of the comparison that a row's bricks were trained on."""
        refs = [str(ref) for ref in bricks(self.inputs.trees[label])]
        found = {task for ref in refs for task in self.inputs.owners.get(ref, ())}
        return [task for task in self.tasks if task in found]

    @cached_property
    def unrelated(self) -> list[str]:
        """Tasks that no brick here was trained on."""
        return [task for task in self.tasks if all(task not in self.own(x) for x in self.bodies)]

    @cached_property
    def ranked_tasks(self) -> list[str]:
        """The tasks that averages are over: those of the bricks, or all where they have none."""
        return [task for task in self.tasks if task not in self.unrelated] or self.tasks

    @cached_property
    def individuals(self) -> dict[str, str]:
        """Each task's own brick: the first that was trained on it alone."""
        found: dict[str, str] = {}
        for label, body in self.bodies.items():
            owned = self.own(label)
            if body.role == "brick" and len(owned) == 1:
                found.setdefault(owned[0], label)
        return {task: found[task] for task in self.ranked_tasks if task in found}

    @cached_property
    def families(self) -> list[list[str]]:
        """Rows that differ in what is tuned alone."""
        return tuned_families(self.inputs.trees)

    @cached_property
    def validation(self) -> dict[str, float]:
        """What each row of a family is chosen by: its mean over validation splits.

        Losses and errors count as negative numbers, so that higher is better. A family without
        validation rows is not there.
        """
        found: dict[str, float] = {}
        for family in self.families:
            tasks = [
                task for task in self.own(family[0]) or self.ranked_tasks
                if self.scorer.tasks[task].validation is not None
            ]  # fmt: skip
            if not tasks:
                continue
            scores = {
                label: row(
                    self.scorer, self.bodies[label], tasks, self.scene.heads, split="validation"
                )
                for label in family
            }
            columns = zip(*scores.values(), strict=True)
            merits = zip(*(_merits(list(column)) for column in columns), strict=True)
            found |= {
                label: sum(each) / len(each)
                for label, each in zip(family, map(list, merits), strict=True)
            }
        return found

    @cached_property
    def chosen(self) -> list[str]:
        """The row of each family that is best on validation."""
        judged = [family for family in self.families if family[0] in self.validation]
        return [max(family, key=lambda label: self.validation[label]) for family in judged]

    def competes(self, label: str) -> bool:
        """Whether a row may win: no bound, and no point of a curve that was not chosen."""
        passed_over = label in self.validation and label not in self.chosen
        return label in self.bodies and self.bodies[label].role in RIVALS and not passed_over

    def shown(self) -> list[Body]:
        """The bodies that are looked at closely: all but points of curves that were not chosen."""
        return [
            body for label, body in self.bodies.items()
            if label not in self.validation or label in self.chosen
        ]  # fmt: skip

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """Rows that differ by the seed alone, by what they have in common."""
        rivals = {x: tree for x, tree in self.inputs.trees.items() if self.competes(x)}
        found = {}
        for members in seed_families(rivals, self.scene_library, self.chosen):
            names = {without_versions(label) for label in members}
            found[names.pop() if len(names) == 1 else f"{members[0]} and others"] = members
        return found

    @property
    def scene_library(self) -> Any:
        """The library that the bricks lie in."""
        return self.inputs.selection.library

    @cached_property
    def ranking(self) -> Ranking:
        """All rows on the tasks that count, resampled together."""
        return self._ranked(self.rows, self.ranked_tasks, self.individuals)

    def _ranked(
        self,
        rows: Mapping[str, Sequence[Scored]],
        tasks: Sequence[str],
        individuals: Mapping[str, str] | None = None,
    ) -> Ranking:
        at = {task: number for number, task in enumerate(self.tasks)}
        first = next(iter(rows.values()))
        return Ranking(
            {
                label: {task: scored[at[task]].examples for task in tasks}
                for label, scored in rows.items()
            },
            {task: first[at[task]].metric for task in tasks},
            individuals or {},
            {task: self.inputs.tasks[task].fingerprints["test"] for task in tasks},
            bootstrap=self.bootstrap,
            seed=self.scorer.seed,
        )

    # -- the record --------------------------------------------------------------------------------

    def comparison(self) -> Json:
        """The ``comparison`` of the record, but for what was reused."""
        ranking, grouped = self.ranking, {x for members in self.groups.values() for x in members}
        rivals = {x: [x] for x in self.rows if self.competes(x) and x not in grouped}
        means, normalised = ranking.means(), ranking.normalised()
        return {
            "tasks": self.ranked_tasks,
            "test_sets": len(ranking.groups),
            "individuals": self.individuals,
            "unrelated": self.unrelated,
            "rows": [
                {
                    **self._row(label),
                    "competes": self.competes(label),
                    "mean": means.get(label),
                    "normalised": normalised.get(label),
                }
                for label in self.rows
            ],
            "groups": [
                {
                    "label": label,
                    "members": members,
                    "mean": ranking.figure_of(members, normalised=False),
                    "normalised": ranking.figure_of(members, normalised=True),
                }
                for label, members in self.groups.items()
            ],
            "winner": ranking.winner(rivals | self.groups),
            "curves": self._curves(),
            "similarity": self._similarity(),
            "orders": order_effects(self),
            "forgetting": [*self._forgetting()],
            "lineage": self._lineage(),
        }

    def _row(self, label: str) -> Json:
        if label == BARE.label:
            empty = dict.fromkeys(("brick", "chosen_on", "parameters", "bytes", "seconds"))
            named = {"label": label, "short": label, "expression": label, "role": "floor"}
            return {**named, **empty, "seconds_of": None, "parts": []}
        body, selection = self.bodies[label], self.inputs.selection
        tree = selection.trees[selection.labels.index(label)]
        card = selection.card_of(tree)
        assert body.brick is not None
        tensors = list(body.brick.parameters())
        seconds, what = self._seconds(label, card)
        refs = dict.fromkeys(str(ref) for ref in bricks(self.inputs.trees[label]))
        return {
            "label": label,
            "short": card.name if card else short(tree),
            "expression": str(self.inputs.trees[label]),
            "role": body.role,
            "brick": None if card is None else self._part(card),
            "parts": [self._part(self.scene_library.find(ref)) for ref in refs],
            "chosen_on": "validation" if label in self.chosen else None,
            "parameters": sum(p.numel() for p in tensors),
            "bytes": sum(p.numel() * p.element_size() for p in tensors),
            "seconds": seconds,
            "seconds_of": what,
        }

    def _seconds(self, label: str, card: Card | None) -> tuple[float | None, str | None]:
        """What making a row took, and which part of making it that is."""
        if card is None:
            return self.scene.seconds[label], "assembly"
        cost = self.records.get(card.run, {}).get("cost")
        if cost is None:
            return None, None
        if cost["train_seconds"] is not None:
            return cost["train_seconds"], "training"
        return cost["seconds"], "run"

    def _part(self, card: Card) -> Json:
        return {
            "name": card.name,
            "version": card.version,
            "operation": card.operation,
            "path": str(self.scene_library.folder(card)),
            "data": _data(card),
        }

    def _curves(self) -> list[Json]:
        """Curves on the test rows of the tasks that their bricks were trained on, which chose."""
        found = []
        for curve in curves(self.inputs.trees):
            labels = [label for _, label in curve.points]
            tasks = self.own(labels[0]) or self.ranked_tasks
            means = self._ranked({label: self.rows[label] for label in labels}, tasks).means()
            points = [
                {
                    "x": x,
                    "row": label,
                    "mean": means.get(label),
                    "validation": self.validation.get(label) if means else None,
                    "chosen": label in self.chosen,
                }
                for x, label in curve.points
            ]
            found.append({
                "parameter": curve.parameter, "name": curve.name, "family": curve.family,
                "tasks": tasks, "points": points,
            })  # fmt: skip
        return found

    def _similarity(self) -> Json | None:
        found = {
            body.label: body.brick for body in self.shown()
            if body.brick is not None and body.brick.kind != STITCH and body.brick.tensors()
        }  # fmt: skip
        if len(found) < 2:
            return None
        told = similarity(found)
        pairs = [{k: v for k, v in pair.items() if k != "layers"} for pair in told["pairs"]]
        return {"labels": told["labels"], "pairs": pairs}

    def _forgetting(self) -> Iterator[Json]:
        """Every row on every task that none of its bricks was trained on, by the same head."""
        for body in self.shown():
            for task in self.tasks:
                if task in self.own(body.label):
                    continue
                spec = self.scorer.tasks[task].spec
                head = None if spec.type in GENERATIVE else TrainedOn(BARE)
                of = None if head is None else BARE.label
                bare = self.scorer.score(BARE, task, head, of=of)
                plugged = self.scorer.score(body, task, head, of=of)
                metric = "perplexity" if "perplexity" in bare.scores else bare.metric
                change = advantage(
                    plugged.examples,
                    bare.examples,
                    metric,
                    bootstrap=self.bootstrap,
                    seed=self.scorer.seed,
                )
                yield {
                    "row": body.label,
                    "task": task,
                    "metric": metric,
                    "bare": bare.scores[metric].as_dict(),
                    "with_brick": plugged.scores[metric].as_dict(),
                    "change": change.as_dict(),
                }

    def _lineage(self) -> Json:
        """Everything that the rows shown were made from, with the configurations in between."""
        selection, nodes, edges = self.inputs.selection, dict[str, Json](), dict[Any, Any]()

        def add(tree: Expression) -> str:
            if isinstance(tree, BrickRef):
                return add_card(self.scene_library.find(str(tree)))
            key = tree.digest()[:12]
            if key not in nodes:
                nodes[key] = {"id": key, "name": short(tree), "version": key, "path": None}
                nodes[key] |= {"kind": "configuration", "operation": tree.fn, "data": {}}
                connect(tree, key)
            return key

        def add_card(card: Card) -> str:
            if card.ref not in nodes:
                nodes[card.ref] = {"id": card.ref, "kind": "brick", **self._part(card)}
                if card.operation in MADE and card.expression:
                    try:
                        connect(parse(card.expression), card.ref)
                    except UserError:  # its bricks are gone: their names are all there is
                        for parent in card.parents:
                            edges[f"{parent['name']}@{parent['version']}", card.ref] = None
            return card.ref

        def connect(tree: Expression, key: str) -> None:
            if isinstance(tree, Call):
                for arg, weight in zip(tree.args, _weights(tree), strict=True):
                    edges[add(arg), key] = weight

        shown = {body.label for body in self.shown()}
        for label, tree in zip(selection.labels, selection.trees, strict=True):
            if label in shown:
                add(tree)
        known = [(a, b, weight) for (a, b), weight in edges.items() if a in nodes]
        return {
            "nodes": list(nodes.values()),
            "edges": [{"a": a, "b": b, "weight": weight} for a, b, weight in known],
        }

    def lines(self, comparison: Json) -> Iterator[str]:
        """What a person reads in the terminal besides the matrix."""
        for label in self.chosen:
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


def _merits(column: Sequence[Scored]) -> list[float]:
    """Scores of one task as numbers that are better when higher and can be averaged."""
    metric = column[0].metric
    values = [one.scores[metric].value for one in column]
    return [-value for value in values] if metric in LOWER_IS_BETTER else values


def _weights(tree: Call) -> list[float | None]:
    """What each argument of a merge weighs, λ included; the mean of weights over depth."""
    params = dict(tree.params)
    given, scale = params.get("weights"), params.get("scale", 1.0)
    if tree.fn != "merge" or not isinstance(given, tuple) or not isinstance(scale, int | float):
        return [None] * len(tree.args)
    mean: Callable[[Any], float] = lambda w: sum(w) / len(w) if isinstance(w, tuple) else float(w)  # noqa: E731
    return [mean(weight) * scale for weight in given]


def _data(card: Card) -> dict[str, str]:
    """The data that a brick's training read: name -> start of the fingerprint."""
    return {str(each.get("name")): str(each.get("fingerprint"))[:12] for each in card.data}
