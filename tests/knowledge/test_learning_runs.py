"""Training on documents as runs: killed, resumed, what every pass costs, a rate that is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.callbacks import Callback

from cfm_train.bricks.brick import Brick
from cfm_train.training.module import BrickModule
from cfm_train.training.objectives import BESIDE, count_items
from tests.backbones import LAYERS, tiny
from tests.knowledge.learning import (
    SPEC,
    batch_of,
    cartridge,
    learning_on,
    lora,
)
from tests.training.runs import BreakOff, BrokenOff, train

#: Weights in the products of a layer of the tiny Llama: width 32, two of four heads for keys and
#: values, feed-forward 48.
LLAMA_LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48


@pytest.mark.parametrize(("kind", "others"), [("lm", 0), ("distill", 3)])
def test_a_killed_run_goes_on_to_the_same_brick(kind: str, others: int, tmp_path: Path) -> None:
    """With unrelated text beside the documents, and with other cartridges drawn in each step."""
    backbone = tiny("llama")
    learning, tasks = learning_on(backbone, tmp_path, kind, others, keep=0.5)

    def go(brick: Brick, folder: Path, *callbacks: Any) -> Any:
        return train(
            backbone,
            brick,
            tasks,
            folder,
            callbacks=callbacks,
            learning=learning,
            max_steps=6,
            validate_every=3,
            checkpoint_every=1,
            accumulate=2,
        )

    straight, broken = (cartridge(backbone, 0) for _ in range(2))
    whole = go(straight, tmp_path / "whole")
    with pytest.raises(BrokenOff):
        go(broken, tmp_path / "broken", BreakOff(4))
    fresh = cartridge(backbone, 0)
    resumed = go(fresh, tmp_path / "broken")
    assert straight.files() == fresh.files()
    assert (whole.rows, whole.tokens) == (resumed.rows, resumed.tokens)
    assert not backbone.slots.plan


class Outputs(Callback):
    """Keeps what each step says of itself, and its micro-batches."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes one step."""
        self.steps.append((outputs, batch))


@pytest.mark.parametrize("kind", ["lm", "distill"])
def test_every_pass_costs_and_only_documents_are_samples(kind: str, tmp_path: Path) -> None:
    """4N with gradients, 2N for each token that the bare backbone reads, as teacher or beside."""
    backbone = tiny("llama")
    learning, tasks = learning_on(backbone, tmp_path, kind, 0, keep=0.5)
    watch, n = Outputs(), LAYERS * LLAMA_LAYER
    fitted = train(
        backbone,
        lora(backbone),
        tasks,
        tmp_path / "run",
        callbacks=[watch],
        learning=learning,
        max_steps=3,
        validate_every=3,
    )
    train_rows = tasks["handbook"].train
    rows = tokens = 0
    for outputs, (own, other) in watch.steps:
        index = own["index"].tolist()
        assert (own["task"], other["task"]) == ("handbook", BESIDE)
        assert outputs["rows"] == len(index)
        assert outputs["tokens"] == sum(len(train_rows.slice("input_ids", i)) for i in index)
        beside = int(other["attention_mask"].sum())
        read = beside
        if kind == "distill":
            read += sum(len(train_rows.slice("context_ids", i)) for i in index) + outputs["tokens"]
        assert outputs["flops"] == n * (4 * (outputs["tokens"] + beside) + 2 * read)
        rows, tokens = rows + outputs["rows"], tokens + outputs["tokens"]
    assert (fitted.rows, fitted.tokens, len(watch.steps)) == (rows, tokens, 3)


def test_a_learning_rate_is_found_with_other_text_beside(tmp_path: Path) -> None:
    """Of the loss of a step: the objective's mean, and that of the other text by its weight."""
    backbone = tiny("llama")
    learning, tasks = learning_on(backbone, tmp_path, "distill", 0, keep=0.5)
    brick = lora(backbone)
    options = {"max_steps": 2, "validate_every": 2, "find_learning_rate": True}
    fitted = train(backbone, brick, tasks, tmp_path / "run", learning=learning, **options)
    curve = json.loads((tmp_path / "run" / "learning_rate.json").read_text())
    assert fitted.learning_rate == curve["suggestion"]
    module = BrickModule(backbone, lora(backbone), {"handbook": SPEC}, Any, learning)  # type: ignore[arg-type]
    own = batch_of(tasks["handbook"].train, range(4))
    beside = batch_of(learning.beside, range(2), BESIDE)
    totals = module.totals([own, beside])
    assert totals == {False: count_items("causal", own), True: count_items("causal", beside)}
    assert module.share(6.0, own, totals) == 6.0 / totals[False]
    assert module.share(6.0, beside, totals) == 0.5 * 6.0 / totals[True]
