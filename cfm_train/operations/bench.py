"""Where points of a search are tried: the merge that a point stands for, on rows of each task.

    point ─► weights, parameters ─► plugged together, or merged ─► answers ─► cost

Rows are tokenised once. Bricks whose weighted sum is asked for are plugged together with their
weights; only other merges are made anew for each point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.head import HeadOnly
from cfm_train.bricks.heads import Head
from cfm_train.config.searching import Axis, parameters
from cfm_train.data.batches import BatchStream
from cfm_train.data.encode import Encoded, encode_rows
from cfm_train.data.tasks import LOWER_IS_BETTER, TaskSpec
from cfm_train.errors import UserError
from cfm_train.evaluation.evaluator import predict
from cfm_train.evaluation.judge import judge_task, primary
from cfm_train.merging.engine import Statistics, carry_heads, merge
from cfm_train.merging.mix import Mix, make_mix
from cfm_train.merging.search.plugged import Followed, adds_up, plan
from cfm_train.merging.search.search import Point, Problem, make_search
from cfm_train.merging.weights import Weight, interpolate
from cfm_train.operations.sought import Sought
from cfm_train.paths import cache_dir
from cfm_train.training.dataset import EvaluationDataset, evaluation_tokens, make_batch
from cfm_train.training.objectives import compute

#: Padded tokens of a gradient's batch at most; the search says how many rows it has.
STEP_TOKENS = 8192

#: What of an encoded split tells the right answers.
_ANSWERS = ("labels", "token_labels", "target_ids", "target_offsets")


@dataclass(frozen=True)
class Tried:
    """A point and how it did.

    Attributes:
        point: one number for each axis.
        value: the mean over the tasks of what is compared, in its own unit, or as a share of what
            it was at the start where tasks count alike.
        scores: what is compared of each task, in its own unit.
        cost: what is minimised, penalty included; infinite for a point that makes no merge.
    """

    point: list[float]
    value: float
    scores: dict[str, float]
    cost: float


class Bench:
    """Tries points.

    Args:
        bricks: the parents.
        backbone: nothing plugged.
        merge: the section ``merge``.
        given: the merge's own weights, or None for a rule without.
        sought: the method, axes, tasks and rows.
        labels: names of the bricks.
        sources: name and version of each brick.
        statistics: for rules that need them.
        seed: of batches.

    Raises:
        UserError: two bricks bring different heads for a task, or gradients cannot be followed.
    """

    def __init__(
        self,
        bricks: Sequence[Brick],
        backbone: Backbone,
        merge: Mapping[str, Any],
        given: Any,
        *,
        sought: Sought,
        labels: Sequence[str],
        sources: Sequence[str],
        statistics: Statistics | None,
        seed: int,
    ) -> None:
        self.bricks, self.backbone, self.section, self.given = bricks, backbone, dict(merge), given
        self.search = search = make_search(sought.section)
        self.sources, self.statistics = sources, statistics
        self.labels = labels
        self.mix = make_mix(merge)
        holder = HeadOnly()
        carry_heads(bricks, holder)
        self.heads: dict[str, Head | None] = {n: holder.head_for(n) for n in sought.tasks}
        self.specs: dict[str, TaskSpec] = {n: task.spec for n, task in sought.tasks.items()}
        self.rows = {
            name: encode_rows(
                sought.rows[name], task.spec, task.section, backbone.tokenizer, cache_dir()
            )
            for name, task in sought.tasks.items()
        }
        if search.objective == "entropy":
            self.rows = {name: without_answers(rows) for name, rows in self.rows.items()}
        self.axes = list(sought.axes)
        self._followed: Followed | None = None
        self._units: dict[str, float] | None = None
        if search.follows:
            self._follow(str(sought.section["by"]))
            self._streams = {
                name: BatchStream(
                    {name: rows.lengths},
                    tokens_per_batch=STEP_TOKENS,
                    rows_per_batch=sought.section["batch"],
                    seed=seed,
                )
                for name, rows in self.rows.items()
            }
        self.problem = Problem(
            axes=self.axes,
            start=self._start(),
            seed=seed,
            skips=self.skips,
            bricks=len(bricks),
            slope=self.slope if self._followed else None,
        )

    def _follow(self, by: str) -> None:
        if not adds_up(self.bricks, self.mix):
            raise UserError(
                f"search={self.search.kind} follows the gradient of a plain sum of low-rank "
                "updates, and these bricks have none: use search=grid, bayes or cma_es."
            )
        layers = dict(self.backbone.sites.layers)
        knots = max(layers.values()) if by == "layer" else 1
        self._followed = Followed(self.bricks, self.mix, layers, knots)
        for label in self.labels:
            name = f"weight of {label}"
            many = [f"{name}, layer {k}" for k in range(knots)] if knots > 1 else [name]
            self.axes += [Axis(one, ()) for one in many]

    def _start(self) -> list[float]:
        """The merge's own values on all axes; a curve over depth is read where it is asked for."""
        if self._followed is not None:
            given = self.mix.weights(self.given, len(self.bricks), {"": 1}).given
            return [w for one in given for w in knots_of(one, self._followed.knots)]
        found = [float(self.section[axis.name] or 0) for axis in self.axes if axis.parameter]
        if len(found) == len(self.axes):
            return found
        return [sum(knots_of(one, 2)) / 2 for one in self.given] + found

    def weights(self, point: Point) -> Any:
        """The weights that a point stands for, as an expression has them."""
        if self._followed is not None:
            knots = self._followed.knots
            rows = [list(point[at : at + knots]) for at in range(0, len(point), knots)]
            return rows if knots > 1 else [row[0] for row in rows]
        found = [v for axis, v in zip(self.axes, point, strict=True) if not axis.parameter]
        return [float(value) for value in found] or self.given

    def mixed(self, point: Point) -> Mapping[str, Any]:
        """The section ``merge`` with the parameters that a point stands for."""
        if self._followed is not None:
            return self.section
        return {**self.section, **parameters(self.axes, point, self.section)}

    def skips(self, point: Point) -> bool:
        """Whether weights add up to zero where they are averaged."""
        weights = self.weights(point)
        if weights is None or (self.mix.rule.linear and not self.mix.normalize):
            return False
        means = [sum(knots_of(one, 2)) / 2 for one in weights]
        return abs(math.fsum(means)) < 1e-8

    def try_out(self, point: Point) -> Tried:
        """The cost of a point."""
        point = [float(value) for value in point]
        if self.skips(point):
            return Tried(point, math.nan, {}, math.inf)
        with self._plugged(point):
            scores = {name: self._score(name) for name in self.rows}
        shares = scores
        if self.search.objective == "loss" and self.search.balance:
            if self._units is None and point == list(self.problem.start):
                self._units = _units(scores)
            shares = {name: score / self.unit(name) for name, score in scores.items()}
        value = math.fsum(shares.values()) / len(shares)
        cost = value if all(map(self.lower_is_better, scores)) else -value
        return Tried(point, value, scores, cost + self.search.penalty(point))

    def unit(self, task: str) -> float:
        """What a task's loss is divided by where tasks count alike: its loss at the start."""
        if not self.search.balance:
            return 1.0
        if self._units is None:
            with self._plugged(self.problem.start):
                self._units = _units({name: self._loss(name) for name in self.rows})
        return self._units[task]

    def lower_is_better(self, task: str) -> bool:
        """Whether less of what is compared is better."""
        return self.search.objective != "metric" or self.specs[task].metric in LOWER_IS_BETTER

    @contextmanager
    def _plugged(self, point: Point) -> Iterator[None]:
        mix, weights = make_mix(self.mixed(point)), self.weights(point)
        if adds_up(self.bricks, mix):
            layers = self.backbone.sites.layers
            given = mix.weights(weights, len(self.bricks), layers)
            parts, shares = plan(self.bricks, given, mix.scale)
            with self.backbone.slots.plugged(parts, shares):
                yield
        else:
            with self.backbone.slots.plugged([self.merged(mix, weights)]):
                yield

    def merged(self, mix: Mix, weights: Any) -> Brick:
        """The merge itself."""
        return merge(
            self.bricks,
            weights,
            mix,
            self.backbone,
            sources=self.sources,
            statistics=self.statistics,
        ).brick

    def _score(self, task: str) -> float:
        if self.search.objective == "entropy":
            return self._entropy_of_all(task)
        if self.search.objective == "loss":
            return self._loss(task)
        spec, head, rows = self.specs[task], self.heads[task], self.rows[task]
        scores = judge_task(self.backbone, head, spec, rows).scores(bootstrap=0, seed=0)
        return scores[primary(spec, scores)].value

    def _loss(self, task: str) -> float:
        spec, head, rows = self.specs[task], self.heads[task], self.rows[task]
        return predict(self.backbone, head, spec, rows).loss()

    @torch.inference_mode()
    def _entropy_of_all(self, task: str) -> float:
        pad = self.backbone.tokenizer.pad_token_id
        total = 0.0
        tokens = evaluation_tokens(self.backbone.device)
        for batch in EvaluationDataset({task: self.rows[task]}, tokens, pad):
            total += self._entropy(task, batch).sum().item()
        return total / len(self.rows[task])

    def _entropy(self, task: str, batch: Mapping[str, Any]) -> Tensor:
        head = self.heads[task]
        assert head is not None
        device = self.backbone.device
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        extra = {k: batch[k].to(device) for k in ("token_type_ids",) if k in batch}
        logits = head.raw(self.backbone.hidden_states(ids, mask, **extra), mask)
        return entropy(logits, several=self.specs[task].type == "multilabel")

    def slope(self, weights: Tensor, step: int) -> float:
        """Adds the gradient of a step's mean loss (or entropy) to ``weights.grad``.

        Where tasks count alike, each task's loss is in `unit` of its own.

        Args:
            weights: ``[N, K]`` float64, a leaf that wants gradients.
            step: decides the rows, from 0.

        Returns:
            The loss.
        """
        assert self._followed is not None
        pad, device = self.backbone.tokenizer.pad_token_id, self.backbone.device
        total = 0.0
        for name, rows in self.rows.items():
            _, chosen = self._streams[name].batch_at(step)
            batch = make_batch(name, rows, chosen, pad)
            batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
            shares = self._followed.weights(weights)
            with self.backbone.slots.plugged(self._followed.parts, shares), torch.enable_grad():
                if self.search.objective == "entropy":
                    loss = self._entropy(name, batch).mean()
                else:
                    found = compute(self.specs[name].type, self.backbone, self.heads[name], batch)
                    loss = found.loss / max(1, found.count)
                loss = loss / self.unit(name) / len(self.rows)
                loss.backward()
            total += loss.item()
        return total


def _units(losses: Mapping[str, float]) -> dict[str, float]:
    """Losses that others are divided by: a loss of zero has nothing to be compared with."""
    return {name: loss if loss > 0 else 1.0 for name, loss in losses.items()}


def knots_of(weight: Weight, count: int) -> list[float]:
    """A weight at so many places over the depth, from the first layer to the last."""
    return [interpolate(weight, at / max(1, count - 1)) for at in range(count)]


def entropy(logits: Tensor, *, several: bool) -> Tensor:
    """The entropy of each row's answer in nats, ``[rows]``.

    Args:
        logits: ``[rows, labels]``.
        several: whether each label is there or not by itself: their entropies are added up.
    """
    if several:
        both = torch.stack([logits, -logits])
        return -(both.sigmoid() * F.logsigmoid(both)).sum((0, 2))
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def without_answers(rows: Encoded) -> Encoded:
    """Inputs alone: nothing of what is right is there to be read."""
    arrays = {name: value for name, value in rows.arrays.items() if name not in _ANSWERS}
    return replace(rows, arrays=arrays, rows=[])
