"""Facts taught by shared maps: a plain loop beside it, and from teaching to what is said."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.encoded_rows import EncodedRows
from cfm_train.bricks.fact_gate import Encoder
from cfm_train.bricks.map import Map
from cfm_train.knowledge.calibrating import calibrate
from cfm_train.knowledge.fact_figures import judge
from cfm_train.knowledge.teach import answer_ids, prompt_ids, schedule
from cfm_train.knowledge.teach_shared import teach_shared
from tests.backbones import section, tiny
from tests.fact_cases import TOLD

SETTINGS = {
    "steps": 6,
    "prompts_per_step": 2,
    "facts_per_batch": 3,
    "context_share": 0.0,
    "clip": 0.0,
    "enough": 0.0,
    "patience": 3,
}
KINDS: dict[str, Any] = {
    "encoded_rows": lambda: EncodedRows(rows=4, told="answer", sites=["attn"], layers=None),
    "map": lambda: Map(tokens=1, told="statement"),
}


def new(kind: str, backbone: Backbone) -> Any:
    brick = KINDS[kind]().for_facts([fact.taught() for fact in TOLD])
    brick.read(Encoder(section("bert")))
    torch.manual_seed(0)  # loading an encoder for the first time draws numbers
    return brick.build(backbone)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_loop_comes_to_the_same(kind: str) -> None:
    """Prompt after prompt without a batch, the mean of their losses, and Adam's formula."""
    backbone = tiny("llama")
    ours, plain = new(kind, backbone), new(kind, backbone)
    found = teach_shared(
        backbone, ours, TOLD, SETTINGS, learning_rate=1e-3, front=[], seed=0, gated=True
    )
    parameters = list(plain.parameters())
    start = {name: value.detach().clone() for name, value in plain.named_parameters()}
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step in range(1, 7):
        losses = []
        for at, fact in enumerate(TOLD):
            plain.fire(torch.tensor([at]))
            for text in fact.prompts:  # two each: every step shows both
                prompt, answer = prompt_ids(backbone, text), answer_ids(backbone, fact)
                with backbone.slots.plugged([plain]):
                    logits = backbone.logits(input_ids=torch.tensor([[*prompt, *answer]]))[0]
                losses.append(
                    torch.nn.functional.cross_entropy(
                        logits[len(prompt) - 1 : -1], torch.tensor(answer)
                    )
                )
        gradients = torch.autograd.grad(torch.stack(losses).mean(), parameters)
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.95).add_(0.05 * g.square())
                step_size = 1e-3 * schedule(step, 6)
                p -= step_size * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-7)
    for name, value in ours.named_parameters():
        # Adam makes a step of any gradient's rounding where the gradient is next to nothing.
        apart = (value - plain.get_parameter(name)).abs()
        assert float(apart.mean()) < 1e-5 and float(apart.max()) < 1e-3, name
        assert (value - start[name]).abs().max() > 3e-3, name
    assert found.steps == [6, 6, 6] and found.losses[0] == pytest.approx(
        float(torch.stack(losses[:2]).mean()), abs=1e-3
    )


def test_taught_together_and_said_apart() -> None:
    """From teaching to what is said, the gate choosing the fact of each row."""
    backbone = tiny("llama")
    facts = [dataclasses.replace(f, neighbours=("w50 w10 w11",)) for f in TOLD]
    brick, ticks = new("encoded_rows", backbone), []
    # A model of two layers that was never trained leaves its endings in doubt, and says them right.
    settings = SETTINGS | {"steps": 300, "enough": 0.9}
    found = teach_shared(
        backbone, brick, facts, settings, learning_rate=1e-2, front=[], seed=0, gated=True,
        tick=lambda *row: ticks.append(row),
    )  # fmt: skip
    assert ticks[-1][2] == 0 and len(ticks) == found.steps[0] < 300
    brick.eval().requires_grad_(False)
    brick.gate = calibrate(facts, Encoder(section("bert")), false_fires=0.0, threshold=-1.0).gate
    figures, _ = judge(backbone, brick, facts, unrelated=None, bootstrap=5, seed=0)
    for name in ("prompt", "paraphrases"):
        assert figures[f"{name}/brick/exact_match"]["value"] == 1
        assert figures[f"{name}/brick/teacher_forced_accuracy"]["value"] == 1
    assert figures["neighbours/argmax unchanged"]["value"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_drawn_by_the_seed(kind: str) -> None:
    """In batches, with contexts and clipped, the loss falls; twice it comes to the same bits."""
    backbone = tiny("llama")
    settings = SETTINGS | {"steps": 20, "facts_per_batch": 2, "context_share": 0.5, "clip": 1.0}
    bricks = [new(kind, backbone) for _ in range(2)]
    losses: list[float] = []
    for brick in bricks:
        teach_shared(
            backbone, brick, TOLD, settings, learning_rate=3e-3, front=["w30 w31."], seed=0,
            gated=True, tick=lambda step, loss, left: losses.append(loss),
        )  # fmt: skip
    assert all(map(torch.equal, bricks[0].parameters(), bricks[1].parameters()))
    assert losses[19] < losses[0]


def test_without_a_gate_attention_learns_to_choose() -> None:
    """All facts are seen on every row, in teaching as in use."""
    backbone = tiny("llama")
    settings = SETTINGS | {"steps": 300, "enough": 0.05}
    brick = new("encoded_rows", backbone)
    teach_shared(backbone, brick, TOLD, settings, learning_rate=1e-2, front=[], seed=0, gated=False)
    brick.eval().requires_grad_(False)
    figures, _ = judge(backbone, brick, TOLD, unrelated=None, bootstrap=5, seed=0)
    assert figures["prompt/brick/exact_match"]["value"] == 1
    assert "prompt/gate finds the fact" not in figures
