"""Small documents for the tiny backbones: sentences of their words, a paragraph each."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from cfm_train.config.compose import compose
from cfm_train.config.validate import validate
from cfm_train.knowledge.documents import Documents, read
from tests.conftest import ROOT

#: Recipes whose bricks are virtual tokens.
VIRTUAL = ("cartridge", "prefix")


def text(paragraphs: int = 24, seed: int = 0) -> str:
    """Paragraphs of 6 to 9 words, none like another; the rule makes a question of each."""
    draw = random.Random(seed)
    lines = []
    for _ in range(paragraphs):
        lines.append(" ".join(f"w{n}" for n in draw.sample(range(3, 64), draw.randint(6, 9))))
    return "\n\n".join(lines) + "\n"


def section(documents: Path, **changed: Any) -> dict[str, Any]:
    """The section ``data`` of `recipes/knowledge/_documents.yaml`."""
    file = ROOT / "recipes" / "knowledge" / "_documents.yaml"
    own = yaml.safe_load(file.read_text(encoding="utf-8"))["data"]
    return {**own, "documents": str(documents), "max_length": 32, "context": 32} | changed


def documents(folder: Path, seed: int = 0, paragraphs: int = 24, **changed: Any) -> Documents:
    """A document of its own in a folder, read."""
    path = folder / f"handbook-{seed}.txt"
    path.write_text(text(paragraphs, seed), encoding="utf-8")
    return read(section(path, **changed))


def command(folder: Path, backbone: Path, recipe: str, *more: str) -> list[str]:
    """A run of two steps on a document in a folder."""
    (folder / "handbook.txt").write_text(text(), encoding="utf-8")
    return [
        f"recipe=knowledge/{recipe}",
        "name=handbook",
        "backbone=hf",
        f"backbone.path={backbone}",
        "data.documents=handbook.txt",
        "data.max_length=24",
        "data.context=24",
        "evaluation.bootstrap=20",
        "tracking=disabled",
        *(() if recipe == "prefix" else ("trainer.max_steps=2", "trainer.samples=2")),
        *(("brick.tokens=8",) if recipe in VIRTUAL and "brick=lora" not in more else ()),
        *more,
    ]


def config(*overrides: str) -> dict[str, Any]:
    """A composed and validated config."""
    return validate(compose(list(overrides)))
