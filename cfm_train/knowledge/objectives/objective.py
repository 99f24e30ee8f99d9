"""What a brick learns of documents: one file for each objective, found by its name.

An objective says which rows there are and what is minimised on them, always as a sum over tokens
and their number. Beside it every step may have the brick leave unrelated text as it is:

    loss = Σ_t objective_t / T  +  keep · Σ_u KL(without ‖ with)_u / U

and other bricks may be plugged in beside the brick (`distractors`): in both terms, and in
``without`` too, so that the brick does not undo there what the others do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.config.signature import class_of
from cfm_train.config.types import NonNegative
from cfm_train.data.encode import Encoded
from cfm_train.data.tasks import IGNORED
from cfm_train.knowledge.distractors import Distractors
from cfm_train.knowledge.tokens import Item, Reader
from cfm_train.training.objectives import BESIDE, Batch, Result, next_token_logits

ROOM = "knowledge/objectives"


class Objective(ABC):
    """Base class of the objectives.

    Args:
        learn: what rows are made from.
        keep: weight of what the brick changes on unrelated text; 0 for none.

    Attributes:
        reads_context: whether a teacher reads the passage that a row is from.
        reader: what tokenises the documents; set by `read`.
    """

    reads_context: ClassVar[bool] = False
    reader: Reader

    def __init__(self, learn: list[Literal["documents", "questions"]], keep: NonNegative) -> None:
        self.learn = learn
        self.keep = keep

    def read(self, reader: Reader) -> Self:
        """Takes the documents, and returns the objective."""
        self.reader = reader
        return self

    @abstractmethod
    def train_rows(self) -> Encoded:
        """The rows that are trained on."""

    @abstractmethod
    def loss(self, backbone: Backbone, batch: Batch, *, training: bool = False) -> Result:
        """The loss of one micro-batch with what is plugged in.

        Args:
            backbone: with the brick plugged in.
            batch: the rows.
            training: whether the step is one of training; what is drawn is drawn there alone.
        """

    def tokens_read(self, batch: Batch) -> int:
        """Real tokens that `loss` sends through the backbone without gradients."""
        return 0

    def validation_rows(self) -> Encoded | None:
        """Questions that choose the best step; None where there are none."""
        items = self.asked("validation")
        return self.reader.rows(items) if items else None

    def asked(self, split: str) -> list[Item]:
        """The questions of a split."""
        questions = self.reader.documents.questions[split]
        return [self.reader.question(q, context=self.reads_context) for q in questions]


def make_objective(section: Mapping[str, Any]) -> Objective:
    """The objective of a section ``objective``."""
    arguments = {key: value for key, value in section.items() if key != "kind"}
    made: Objective = class_of(ROOM, section["kind"], Objective)(**arguments)
    return made


@dataclass
class Learning:
    """An objective at work: `training.objectives.Learning`.

    Attributes:
        objective: what is minimised.
        beside: unrelated rows; None where the brick may change them.
        distractors: bricks that are plugged in beside the brick in training.
    """

    objective: Objective
    beside: Encoded | None = None
    distractors: Distractors = field(default_factory=lambda: Distractors([]))

    @property
    def weight(self) -> float:
        """The factor on the loss of unrelated rows."""
        return self.objective.keep

    def loss(self, backbone: Backbone, brick: Brick, batch: Batch, *, training: bool) -> Result:
        """The loss of one micro-batch; in training among distractors."""
        plugged = [brick]
        if self.distractors.bricks:
            plugged = self.distractors.around(brick) if training else plugged
            backbone.slots.plug(plugged)
        if batch["task"] == BESIDE:
            return drift(backbone, batch, [one for one in plugged if one is not brick])
        return self.objective.loss(backbone, batch, training=training)

    def tokens_read(self, batch: Batch) -> int:
        """What the backbone reads without the brick."""
        if batch["task"] == BESIDE:
            return int(batch["tokens"])
        return self.objective.tokens_read(batch)


def drift(backbone: Backbone, batch: Batch, without: Sequence[Brick] = ()) -> Result:
    """KL(without ‖ plugged), token by token: how far a brick moves the backbone's answers.

    Args:
        backbone: the backbone, with the brick plugged in.
        batch: unrelated text, see `next_token_logits`.
        without: what is plugged in beside the brick.
    """
    with backbone.slots.plugged(without), torch.no_grad():
        before, targets = next_token_logits(backbone, batch)
    found, _ = next_token_logits(backbone, batch)
    return divergence(before, found, targets)


def divergence(teacher: Tensor, student: Tensor, targets: Tensor) -> Result:
    """Σ_v p_v (log p_v − log q_v) at every place that counts, summed.

    Args:
        teacher: logits of p ``[batch, places, vocabulary]``, without gradients.
        student: logits of q, the same shape.
        targets: int64 ``[batch, places]``, -100 where nothing counts.
    """
    p, q = (F.log_softmax(logits.float(), dim=-1) for logits in (teacher, student))
    counts = targets != IGNORED
    places = F.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1).where(counts, 0.0)
    rows = counts.sum(dim=1)
    return Result(places.sum(), int(rows.sum()), None, places.detach().sum(dim=1), rows)
