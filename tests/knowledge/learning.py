"""Bricks, objectives and documents to learn from, on tiny backbones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.cartridge import Cartridge
from cfm_train.bricks.kinds import make_brick
from cfm_train.config.compose import option
from cfm_train.data.encode import Encoded, TaskData
from cfm_train.data.tasks import TaskSpec
from cfm_train.knowledge.distractors import Distractors
from cfm_train.knowledge.objectives.objective import (
    Learning,
    Objective,
    make_objective,
)
from cfm_train.knowledge.tokens import Reader
from cfm_train.training.dataset import make_batch
from tests.backbones import randomise
from tests.knowledge.handbooks import documents, text

SPEC = TaskSpec("handbook", "causal", None, "loss", False, ("text",))


def reader_on(backbone: Backbone, folder: Path, **changed: Any) -> Reader:
    return Reader(documents(folder, **changed), backbone.tokenizer, max_length=32, context=32)


def objective(kind: str, reader: Reader, **changed: Any) -> Objective:
    return make_objective({**option("objective", kind), **changed}).read(reader)


def batch_of(encoded: Encoded, rows: Any, task: str = "handbook") -> dict[str, Any]:
    return make_batch(task, encoded, rows, 0)


def lora(backbone: Backbone, noise: float = 0.0) -> Brick:
    section = option("brick", "lora")
    brick = make_brick(section).build(backbone)
    if noise:
        randomise(brick, scale=noise)
    return brick


def cartridge(backbone: Backbone, seed: int) -> Cartridge:
    made = Cartridge(4, "document", None, 1, ["attn"], None, "shared")
    made = made.about(torch.arange(3 + 5 * seed, 7 + 5 * seed)).build(backbone)
    randomise(made, seed)
    return made


def learning_on(backbone: Backbone, folder: Path, kind: str, others: int, **changed: Any) -> Any:
    """An objective at work with unrelated text and some distractors, and its task."""
    (folder / "other.txt").write_text(text(40, seed=9))
    reader = reader_on(backbone, folder, unrelated=str(folder / "other.txt"))
    made = objective(kind, reader, **changed)
    beside = reader.blocks(reader.documents.unrelated["train"], []) if made.keep else None
    around = Distractors([cartridge(backbone, seed) for seed in range(1, others + 1)])
    task = TaskData(SPEC, made.train_rows(), made.validation_rows(), None)
    return Learning(made, beside, around), {"handbook": task}
