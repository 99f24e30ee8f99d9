"""The second stage: a LoRA learns beside an aligned connector, and each is a brick of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from cfm_train.backbone.load import load_backbone
from cfm_train.backbone.spec import resolve
from cfm_train.bricks.kinds import make_brick
from cfm_train.bricks.stored import open_brick
from cfm_train.config.compose import option
from cfm_train.launch.cli import main
from cfm_train.library.store import Library
from cfm_train.modality.encoding import given
from cfm_train.modality.stages import assert_trainable
from cfm_train.training.several import Several
from tests.backbones import folder, tiny
from tests.coloured_items import ALIGN, run
from tests.modality.test_modality import features, ids_of, modality
from tests.peft_tuners import section

QUIET = ["evaluation.bootstrap=20", "tracking=disabled"]


def test_a_lora_learns_beside_an_aligned_connector(
    items: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder("llama"), "lm")
    aligned, _ = run(capsys, *ALIGN, "backbone.path=./lm", "trainer.max_steps=5")
    stage = [
        "recipe=modality/instruct", "name=talk", "bricks=[eyes]", "brick.rank=2",
        "data.items=items.jsonl", "data.test_fraction=0.3", "trainer.precision=float32",
        "trainer.max_steps=20", "trainer.samples=1", *QUIET,
    ]  # fmt: skip
    record, printed = run(capsys, *stage)
    assert "stored: bricks=[talk,talk-lora]" in printed
    assert all(check["passed"] for check in record["checks"].values())
    assert record["checks"]["text logits"]["value"] == 0.0  # of the connector alone
    library = Library("outputs/library")
    before, talk, lora = (library.find(name) for name in ("eyes", "talk", "talk-lora"))
    assert talk.parents == [{"name": "eyes", "version": before.version}]
    assert lora.parents == [{"name": "talk", "version": talk.version}]
    assert talk.version != before.version and (talk.kind, lora.kind) == ("modality", "lora")
    loss = "test/loss"
    assert record["metrics"][loss]["value"] < aligned["metrics"][loss]["value"]
    backbone = load_backbone(
        resolve(option("backbone", "hf", path="./lm")), dtype="float32", device="cpu"
    )
    both = [open_brick(card, library, backbone) for card in (talk, lora)]
    assert all(float(value.abs().max()) > 0 for value in both[1].tensors().values())
    classify = ["recipe=modality/classify", "data.items=items.jsonl", *QUIET]
    classed, _ = run(capsys, *classify, "bricks=[talk,talk-lora]")
    assert classed["metrics"]["test/accuracy"]["n"] == 30
    assert main([*stage[:2], "bricks=[talk,talk-lora]", "data.items=items.jsonl"]) == 2
    assert "must name one modality brick" in capsys.readouterr().err


def test_together_they_are_what_they_are_side_by_side() -> None:
    backbone, eyes = tiny("llama"), modality()
    torch.manual_seed(0)
    lora = make_brick(section("lora")).build(backbone).eval()
    rows = features([[2]])
    ids, mask = ids_of(eyes, [4, *rows[0], 6], 10)
    inputs = {"input_ids": ids[None], "attention_mask": mask[None]}
    found = []
    for plan in ([eyes, lora], [Several([eyes, lora]).eval()]):
        with backbone.slots.plugged(plan), torch.inference_mode():
            backbone.slots.take(given("image", rows))
            found.append(backbone.logits(**inputs))
    assert torch.equal(*found)


def test_the_stage_trains_connector_and_lora_and_nothing_else() -> None:
    backbone, eyes = tiny("llama"), modality()
    lora = make_brick(section("lora")).build(backbone)
    parts = {"brick": eyes, "beside": lora, "backbone": backbone}
    assert_trainable("instruct", parts)
    with pytest.raises(RuntimeError, match=r"stage align: beside.*learns and must not"):
        assert_trainable("align", parts)
    next(lora.parameters()).requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"stage instruct: beside.*must learn and does not"):
        assert_trainable("instruct", parts)
