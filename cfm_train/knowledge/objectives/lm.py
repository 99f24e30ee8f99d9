"""Language modelling: −Σ_t log q(token_t | what is before it), on documents and answers.

Documents are learnt whole; of a question with its answer the answer alone.
"""

from __future__ import annotations

from typing import Literal

from cfm_train.backbone.load import Backbone
from cfm_train.config.types import NonNegative
from cfm_train.data.encode import Encoded
from cfm_train.knowledge.objectives.objective import Objective
from cfm_train.training.objectives import Batch, Result, compute


class LanguageModelling(Objective):
    """Next-token loss of the texts themselves.

    Args:
        learn: see `Objective`.
        keep: see `Objective`.
    """

    def __init__(self, learn: list[Literal["documents", "questions"]], keep: NonNegative) -> None:
        super().__init__(learn, keep)

    def train_rows(self) -> Encoded:
        """Documents and questions in one stream of blocks."""
        documents = self.reader.documents.rows if "documents" in self.learn else []
        questions = self.asked("train") if "questions" in self.learn else []
        return self.reader.blocks(documents, questions)

    def loss(self, backbone: Backbone, batch: Batch, *, training: bool = False) -> Result:
        """Cross entropy on the next token."""
        return compute("causal", backbone, None, batch)
