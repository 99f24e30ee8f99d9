"""Judging a brick on its tasks' test splits, with the check that it comes off without a trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.heads import Head
from cfm_train.data.encode import Encoded, TaskData
from cfm_train.data.tasks import GENERATIVE, TaskSpec
from cfm_train.evaluation.evaluator import Answers, predict
from cfm_train.evaluation.generation import answer_texts
from cfm_train.evaluation.intervals import Score
from cfm_train.training.dataset import make_batch


@dataclass(frozen=True)
class Judged:
    """Scores of one configuration on some tasks.

    Attributes:
        specs: the tasks.
        scores: metric -> score, for each task that has a test split.
        answers: what was predicted, row by row.
        unplugged: the check that the backbone answers as before once nothing is plugged.
    """

    specs: Mapping[str, TaskSpec]
    scores: Mapping[str, Mapping[str, Score]]
    answers: Mapping[str, Answers]
    unplugged: dict[str, Any]

    def figures(self, prefix: str = "test") -> dict[str, dict[str, float | int]]:
        """Figures for the record: ``test/accuracy``, of several tasks ``test/<task>/accuracy``."""
        several = len(self.specs) > 1
        return {
            f"{prefix}/{task}/{metric}" if several else f"{prefix}/{metric}": value.as_dict()
            for task, scores in self.scores.items()
            for metric, value in scores.items()
        }

    def cells(self, brick: str, role: str) -> list[dict[str, Any]]:
        """One cell of the brick × task matrix for each task: its primary metric."""
        return [
            {
                "brick": brick,
                "task": task,
                "metric": primary(self.specs[task], scores),
                **scores[primary(self.specs[task], scores)].as_dict(),
                "role": role,
                "head": brick if self.specs[task].type not in GENERATIVE else None,
            }
            for task, scores in self.scores.items()
        ]


def primary(spec: TaskSpec, scores: Mapping[str, Score]) -> str:
    """The metric that stands for a task: its own, or the first where it could not be computed."""
    return spec.metric if spec.metric in scores else next(iter(scores))


def judge(
    backbone: Backbone,
    brick: Brick,
    tasks: Mapping[str, TaskData],
    settings: Mapping[str, Any],
    *,
    seed: int,
    bare: torch.Tensor | None = None,
) -> Judged:
    """Scores a brick, with its own heads, on the test split of each task.

    Args:
        backbone: the backbone, nothing plugged.
        brick: the brick.
        tasks: the tasks; one without test split is left out.
        settings: the ``evaluation`` section.
        seed: seed of the bootstrap.
        bare: what `probe` gave when the backbone had just been loaded, else it is asked now.
    """
    splits = {name: task.test for name, task in tasks.items() if task.test is not None}
    if bare is None:
        with backbone.slots.plugged([]):
            bare = probe(backbone, tasks)
    scores: dict[str, dict[str, Score]] = {}
    answers: dict[str, Answers] = {}
    for name, split in splits.items():
        spec = tasks[name].spec
        with backbone.slots.plugged([brick]):
            answers[name] = judge_task(backbone, brick.head_for(name), spec, split)
            scores[name] = scores_of(answers[name], settings, seed)
    same = bool(torch.equal(bare, probe(backbone, tasks)))
    return Judged(
        {name: task.spec for name, task in tasks.items()},
        scores,
        answers,
        {"value": same, "tolerance": None, "passed": same},
    )


def judge_task(backbone: Backbone, head: Head | None, spec: TaskSpec, split: Encoded) -> Answers:
    """Predictions on one split with what is plugged now; texts too where the task asks for them."""
    answers = predict(backbone, head, spec, split)
    if spec.type == "seq2seq":
        answers.texts = answer_texts(backbone, spec, split, range(len(split)))
    return answers


def scores_of(answers: Answers, settings: Mapping[str, Any], seed: int) -> dict[str, Score]:
    """The task's metrics with their intervals, and for written answers the loss beside them."""
    return answers.scores(bootstrap=settings["bootstrap"], seed=seed)


@torch.inference_mode()
def probe(backbone: Backbone, tasks: Mapping[str, TaskData]) -> torch.Tensor:
    """What the backbone, as it is plugged, makes of the first rows of the first task.

    Returns:
        Logits where it has a language model head (so every site has had its say), else hidden
        states.
    """
    split = next(iter(tasks.values())).train
    pad = backbone.tokenizer.pad_token_id
    batch = make_batch("probe", split, range(min(4, len(split))), pad)
    ids = batch["input_ids"].to(backbone.device)
    mask = batch["attention_mask"].to(backbone.device)
    if backbone.model.get_output_embeddings() is None:
        return backbone.hidden_states(ids, mask).clone()
    more = {"decoder_input_ids": ids} if backbone.family == "encoder-decoder" else {}
    return backbone.logits(input_ids=ids, attention_mask=mask, **more).clone()
