"""Context distillation: with the brick the backbone answers as if it had read the passage.

    loss = Σ_t KL( p(· | passage, x_<t)  ‖  q(· | x_<t) )       p bare backbone, q with the brick

The teacher is the same frozen backbone with empty slots and the passage before the row (Snell et
al. 2022, arXiv 2209.15189; for cartridges Eyuboglu et al. 2025, arXiv 2506.06266, over the whole
vocabulary here). Rows are the passage's own sentences, every token of them, and questions about it,
their answers. A teacher is asked in the same step as the student, so that nothing is kept on disk
and a resumed run sees the same.

A brick that has never seen its text in the context does not know what to do beside it. So a share
of the micro-batches (``with_text``) has the student read the passage too:

    loss = Σ_t KL( p(· | passage, x_<t)  ‖  q(· | passage, x_<t) )
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cfm_train.backbone.load import Backbone
from cfm_train.config.types import Fraction, NonNegative
from cfm_train.data.encode import Encoded
from cfm_train.knowledge.objectives.objective import Objective, divergence
from cfm_train.training.objectives import (
    Batch,
    Result,
    logits_at,
    next_token_logits,
    next_tokens,
)


class Distillation(Objective):
    """Divergence from the backbone that has the passage in its context.

    Args:
        learn: see `Objective`.
        keep: see `Objective`.
        with_text: the share of micro-batches in which the student reads the passage, too.
    """

    reads_context = True

    def __init__(
        self,
        learn: list[Literal["documents", "questions"]],
        keep: NonNegative,
        with_text: Fraction,
    ) -> None:
        super().__init__(learn, keep)
        self.with_text = with_text

    def train_rows(self) -> Encoded:
        """Sentences and questions, each with its passage; they are never packed."""
        sentences = self.reader.sentences() if "documents" in self.learn else []
        questions = self.asked("train") if "questions" in self.learn else []
        return self.reader.rows([*sentences, *questions])

    def loss(self, backbone: Backbone, batch: Batch, *, training: bool = False) -> Result:
        """KL(teacher ‖ student) on the tokens that count; notes in the batch what was ``shown``."""
        front = len(self.reader.front)
        with backbone.slots.plugged([]), torch.no_grad():
            teacher = read_logits(backbone, batch, front)
        # The draw follows torch's generator, which is set anew for every micro-batch.
        batch["shown"] = training and self.with_text > 0 and float(torch.rand(())) < self.with_text
        if batch["shown"]:
            targets, positions = next_tokens(batch["labels"])
            return divergence(teacher, read_logits(backbone, batch, front), targets[:, positions])
        student, targets = next_token_logits(backbone, batch)
        return divergence(teacher, student, targets)

    def tokens_read(self, batch: Batch) -> int:
        """What the teacher reads: passages and rows, what stands before every text once.

        A passage that the student read was read with gradients, at twice the price: it counts
        two times more.
        """
        read = int(batch["tokens"])
        if "context_mask" in batch:
            again = len(self.reader.front) * len(batch["context_mask"])
            passages = int(batch["context_mask"].sum()) - again
            read += 3 * passages if batch.get("shown") else passages
        return read


def read_logits(backbone: Backbone, batch: Batch, front: int = 0) -> Tensor:
    """What is said at the places that count by a model that reads the context first.

    Args:
        backbone: with whatever is plugged in: nothing, for a teacher.
        batch: rows, with ``context_ids`` and ``context_mask`` where there is a context.
        front: how many tokens the tokenizer puts before every text; they stand before the context,
            and again before the row: there they are left out.

    Returns:
        Logits ``[batch, places, vocabulary]``, as `next_token_logits` has them without context.
    """
    _, positions = next_tokens(batch["labels"])
    if "context_ids" not in batch:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        return logits_at(backbone, positions, **inputs)
    ids = torch.cat([batch["context_ids"], batch["input_ids"][:, front:]], dim=1)
    mask = torch.cat([batch["context_mask"], batch["attention_mask"][:, front:]], dim=1)
    # Contexts end at the same place and begin at different ones: positions count real tokens.
    place = (mask.cumsum(dim=1) - 1).clamp_min(0)
    ahead = batch["context_ids"].shape[1] - front
    return logits_at(
        backbone, positions + ahead, input_ids=ids, attention_mask=mask, position_ids=place
    )
