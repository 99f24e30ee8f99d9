"""Scores of bodies on tasks: taken from an earlier record where one holds them, else evaluated.

    scorer.score(body, "sst2", head)     body plugged in, the head on top, every row of the split

A body is a brick, a configuration of bricks, or the bare backbone. Its head is a brick's own, or
one that is trained on the frozen features of a body (`TrainedOn`): of the bare backbone (the lower
bound), or of the body itself (a refitted head).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.heads import Head
from cfm_train.config.hashing import code_version
from cfm_train.configuration.expression import BrickRef, Expression
from cfm_train.data.encode import Encoded, TaskData
from cfm_train.data.tasks import TaskSpec
from cfm_train.errors import UserError
from cfm_train.evaluation.examples import Examples
from cfm_train.evaluation.floor import train_head
from cfm_train.evaluation.intervals import Score
from cfm_train.evaluation.judge import judge_task, primary
from cfm_train.evaluation.shelf import Shelf

#: Keys of a trainer section that a head trained on frozen features does not depend on.
_NOT_THE_HEADS = frozenset({
    "learning_rate", "threads", "samples", "checkpoint_every", "find_learning_rate", "divergence",
    "precision",
})  # fmt: skip


@dataclass(frozen=True)
class Body:
    """What is plugged in.

    Attributes:
        label: what a person calls it.
        brick: the brick, or what a configuration comes to; None for the bare backbone.
        identity: decides what it computes: a version, or a hash of the configuration and tensors.
        role: the kind of row it makes: ``brick``, ``merged``, ``ceiling`` or ``floor``.
        tree: the configuration, versions pinned; None for the bare backbone.
        note: what has to be said wherever its figures are shown; None for nothing.
    """

    label: str
    brick: Brick | None
    identity: str
    role: str
    tree: Expression | None = None
    note: str | None = None


#: The frozen backbone alone.
BARE = Body("frozen backbone", None, "bare", "floor")


@dataclass(frozen=True)
class TrainedOn:
    """A head that is trained on the frozen features of a body, on the task's training rows."""

    body: Body


@dataclass(frozen=True)
class Scored:
    """One body on one split of one task.

    Attributes:
        body: the body.
        spec: the task.
        head: whose head answered: a label, ``head refitted``, or None for a language model's own.
        key: see `key_of`.
        examples: what each row added to the metrics.
        scores: the metrics with their intervals.
        source: the earlier run, ``<recipe>/<run>``, that the examples are from; None for this one.
    """

    body: Body
    spec: TaskSpec
    head: str | None
    key: str
    examples: Examples
    scores: dict[str, Score]
    source: str | None

    @property
    def metric(self) -> str:
        """The metric that stands for the task."""
        return primary(self.spec, self.scores)

    def cell(self) -> dict[str, Any]:
        """The cell of the brick × task matrix."""
        cell = {
            "brick": self.body.label,
            "task": self.spec.name,
            "metric": self.metric,
            **self.scores[self.metric].as_dict(),
            "role": self.body.role,
            "head": self.head,
            "key": self.key,
        }
        if self.body.note is not None:
            cell["note"] = self.body.note
        return cell if self.source is None else {**cell, "source": self.source}


class Scorer:
    """Asks each question once.

    Args:
        backbone: the backbone, nothing plugged.
        tasks: the tasks.
        fingerprints: of each task's splits.
        tokenizer: hash of the tokenizer.
        trainer: the ``trainer`` section for heads that are trained here.
        evaluation: the ``evaluation`` section.
        seed: seed of training heads and of the bootstrap.
        shelf: what earlier records hold.

    Attributes:
        found: how many questions earlier records had answered.
        made: how many were put to the backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        tasks: Mapping[str, TaskData],
        fingerprints: Mapping[str, Mapping[str, str]],
        *,
        tokenizer: str,
        trainer: Mapping[str, Any],
        evaluation: Mapping[str, Any],
        seed: int,
        shelf: Shelf,
    ) -> None:
        self.backbone, self.tasks, self.fingerprints = backbone, tasks, fingerprints
        self.tokenizer, self.trainer, self.evaluation = tokenizer, trainer, evaluation
        self.seed, self.shelf = seed, shelf
        self.found, self.made = 0, 0
        self._heads: dict[tuple[str, str], Head] = {}

    def score(
        self,
        body: Body,
        task: str,
        head: Head | TrainedOn | None,
        *,
        of: str | None = None,
        split: str = "test",
    ) -> Scored:
        """The scores of a body on a task.

        Args:
            body: the body.
            task: name of the task.
            head: what answers; None where the language model does.
            of: whose head it is, for the record.
            split: ``test`` or ``validation``.

        Raises:
            UserError: the task has no such split.
        """
        spec = self.tasks[task].spec
        rows: Encoded | None = getattr(self.tasks[task], split)
        if rows is None:
            raise UserError(
                f"The task '{task}' has no {split} split: give data.{split}, or leave it out."
            )
        key = self.key(body, task, head, split)
        found = self.shelf.find(key, spec.labels)
        if found is None:
            examples, source = self._evaluate(body, task, head, rows), None
            self.shelf.keep(key, examples)
            self.made += 1
        else:
            examples, source = found
            self.found += source is not None
        scores = examples.scores(bootstrap=self.evaluation["bootstrap"], seed=self.seed)
        return Scored(body, spec, of, key, examples, scores, source)

    def _evaluate(
        self, body: Body, task: str, head: Head | TrainedOn | None, rows: Encoded
    ) -> Examples:
        if isinstance(head, TrainedOn):
            head = self.trained(head.body, task)
        with self.backbone.slots.plugged([] if body.brick is None else [body.brick]):
            return judge_task(self.backbone, head, self.tasks[task].spec, rows).examples()

    def trained(self, body: Body, task: str) -> Head:
        """A head that is trained on the frozen features of a body; once for each task."""
        place = (body.identity, task)
        if place not in self._heads:
            with self.backbone.slots.plugged([] if body.brick is None else [body.brick]):
                self._heads[place] = train_head(
                    self.backbone, self.tasks[task], self.trainer, seed=self.seed
                )
        return self._heads[place]

    def key(self, body: Body, task: str, head: Head | TrainedOn | None, split: str) -> str:
        """The key of a question, see `key_of`."""
        return key_of(
            self.backbone,
            self.tasks[task].spec,
            self.tokenizer,
            identity=body.identity,
            rows=self.fingerprints[task][split],
            max_length=getattr(self.tasks[task], split).max_length,
            head=self._head_identity(head, task),
        )

    def _head_identity(self, head: Head | TrainedOn | None, task: str) -> Any:
        if not isinstance(head, TrainedOn):
            return None if head is None else hash_of_head(head)
        trainer = {k: v for k, v in self.trainer.items() if k not in _NOT_THE_HEADS}
        data = self.fingerprints[task]
        return {
            "trained on": head.body.identity,
            "trainer": trainer,
            "seed": self.seed,
            "rows": [data["train"], data.get("validation")],
            "task": task,  # the head's first values are a function of the name
        }


def key_of(
    backbone: Backbone,
    spec: TaskSpec,
    tokenizer: str,
    *,
    identity: str,
    rows: str,
    max_length: int,
    head: Any,
) -> str:
    """SHA-256 of everything that decides what each row adds to the metrics.

    Args:
        backbone: the backbone.
        spec: the task; its name decides nothing.
        tokenizer: hash of the tokenizer.
        identity: of the body.
        rows: fingerprint of the rows.
        max_length: where rows are cut, in tokens.
        head: JSON that decides the head.
    """
    content = {
        "backbone": [backbone.fingerprint, str(backbone.dtype), backbone.device.type, tokenizer],
        "body": identity,
        "head": head,
        "rows": rows,
        "task": [spec.type, spec.labels, spec.pair, max_length],
        "code": [code_version(), version("torch"), version("transformers"), version("peft")],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hash_of_head(head: Head) -> str:
    """SHA-256 of a head's description and tensors."""
    total = hashlib.sha256(json.dumps(head.describe(), sort_keys=True).encode())
    for name, value in sorted(head.state_dict().items()):
        total.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return total.hexdigest()


def identity_of(tree: Expression, brick: Brick) -> str:
    """What decides the function of a configuration, heads apart.

    Args:
        tree: the configuration, versions pinned.
        brick: what it comes to.

    Returns:
        The version of a single brick; else a hash of the configuration and of all tensors, so that
        statistics and draws that went into a merge count as well.
    """
    if isinstance(tree, BrickRef):
        return str(tree.version)
    total = hashlib.sha256(tree.to_json().encode())
    total.update(json.dumps(brick.interface(), sort_keys=True).encode())
    for name, value in sorted(brick.tensors().items()):
        total.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        total.update(value.detach().double().cpu().numpy().tobytes())
    return total.hexdigest()
