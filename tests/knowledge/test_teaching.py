"""Facts learn apart from each other, the gate finds them, and forgetting one changes no other."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from cfm_train.bricks.brick import Brick
from cfm_train.bricks.cartridge_facts import CartridgeFacts
from cfm_train.bricks.fact_gate import Encoder, without
from cfm_train.bricks.lora_facts import LoraFacts
from cfm_train.bricks.neurons import Neurons
from cfm_train.bricks.rows import Rows
from cfm_train.config.compose import option
from cfm_train.data.facts import Fact
from cfm_train.errors import UserError
from cfm_train.knowledge import calibrating
from cfm_train.knowledge.calibrating import calibrate
from cfm_train.knowledge.fact_figures import generate, judge, logits_of, passes
from cfm_train.knowledge.teach import answer_ids, answer_losses, batch_of, prompt_ids, teach
from cfm_train.knowledge.unrelated import cost
from cfm_train.operations.taught import windows
from tests.backbones import section, tiny
from tests.fact_cases import TOLD

SETTINGS = {
    "steps": 6,
    "prompts_per_step": 2,
    "context_share": 0.5,
    "clip": 1.0,
    "enough": 0.0,
    "patience": 3,
}
KINDS: dict[str, Any] = {
    "neurons": lambda: Neurons(neurons=4, activation="gelu", layers=None),
    "rows": lambda: Rows(rows=4, sites=["attn"], layers=None),
    "lora_facts": lambda: LoraFacts(rank=4, alpha=4, sites=["attn.o", "ffn.down"], layers=None),
    "cartridge_facts": lambda: CartridgeFacts(tokens=5, frozen=1, sites=["attn"], layers=None),
}
#: How near a fact taught alone comes to what it is among others. While B is almost zero, so is A's
#: gradient, and Adam makes steps of what rounding leaves of it.
NEAR = {"lora_facts": 1e-4}
FRONT = ["w30 w31.", "w32 w33 w34."]


def taught(kind: str, facts: list[Fact], rate: float = 0.02, **changed: Any) -> Any:
    backbone = tiny("llama")
    torch.manual_seed(0)
    brick = KINDS[kind]().for_facts([fact.taught() for fact in facts]).build(backbone)
    settings = SETTINGS | changed
    teach(backbone, brick, facts, settings, learning_rate=rate, front=FRONT, seed=0)
    return brick.eval().requires_grad_(False)


def elsewhere(text: str = "w50 w51 w52 w53 w54 w55 w56 w57 w58") -> Any:
    """A text in two windows."""
    return windows(tiny("llama"), text, {"window_tokens": 4, "unrelated_windows": 2})


@pytest.mark.parametrize("kind", KINDS)
def test_a_fact_learns_the_same_alone_as_among_others(kind: str) -> None:
    together = taught(kind, TOLD)
    for at, fact in enumerate(TOLD):
        alone = taught(kind, [fact])
        for name, value in alone.named_parameters():
            torch.testing.assert_close(
                together.get_parameter(name)[at : at + 1], value, atol=NEAR.get(kind, 1e-5), rtol=0
            )


def test_the_first_step_is_adams() -> None:
    """Against `torch.optim.Adam` on a fact's loss written out: one prompt, no context."""
    backbone, fact = tiny("llama"), TOLD[0]
    ours = taught("neurons", [fact], steps=2, prompts_per_step=1, context_share=0.0, clip=0.0)
    torch.manual_seed(0)
    brick = KINDS["neurons"]().for_facts([fact.taught()]).build(backbone)
    optimiser = torch.optim.Adam(brick.parameters(), lr=0.02, betas=(0.9, 0.95), eps=1e-7)
    brick.fire(torch.zeros(1, dtype=torch.int64))
    for step, text in enumerate(fact.prompts, start=1):
        optimiser.param_groups[0]["lr"] = 0.02 * (1 - 0.9 * max(0.0, (step - 2 / 3) / (4 / 3)))
        prompt, answer = prompt_ids(backbone, text), answer_ids(backbone, fact)
        ids = torch.tensor([[*prompt, *answer]])
        with backbone.slots.plugged([brick]):
            logits = backbone.logits(input_ids=ids)[0, len(prompt) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for name, value in brick.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), value, atol=1e-5, rtol=0)


def test_answer_losses_are_means_over_answers() -> None:
    backbone = tiny("llama")
    rows = [([3, 4, 5], [6, 7]), ([8], [9, 10, 11])]
    found = answer_losses(backbone, *batch_of(rows, 0))
    for row, (prompt, answer) in enumerate(rows):
        logits = backbone.logits(input_ids=torch.tensor([[*prompt, *answer]]))[0].double()
        right = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(
            1, torch.tensor(answer)[:, None]
        )
        assert float(found[row]) == pytest.approx(-float(right.mean()), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_taught_found_judged_and_forgotten(kind: str) -> None:
    """From teaching to the card's files and back; the gate decides by itself in generation."""
    backbone = tiny("llama")
    facts = [
        dataclasses.replace(
            fact,
            held_out=(f"{fact.subject} w10",),
            others=(f"{fact.subject} w40",),
            neighbours=("w50 w10 w11",),
        )
        for fact in TOLD
    ]
    brick = taught(kind, facts, rate=0.1, steps=150, enough=0.05, context_share=0.2)
    assert brick.gate is None
    encoder = Encoder(section("bert"))
    made = calibrate(facts, encoder, false_fires=0.0, threshold=-1.0)
    brick.gate = made.gate  # any prompt that names the subject
    answered: list[int] = []
    figures, samples = judge(
        backbone, brick, facts, unrelated=elsewhere(), bootstrap=20, seed=0, tick=answered.append
    )
    assert sum(answered) == passes(facts, elsewhere())
    assert figures["prompt/brick/exact_match"]["value"] == 1
    assert figures["paraphrases/brick/exact_match"]["value"] == 1
    assert figures["prompt/gate finds the fact"]["value"] == 1
    assert figures["neighbours/argmax unchanged"]["value"] == 1
    assert figures["unrelated/perplexity_ratio"] == {"value": 1, "low": 1, "high": 1, "n": 2}
    assert samples[0]["reference"] == facts[0].answer

    # Plugged like any brick: it reads the prompt itself, and what is written keeps its fact.
    prompts = [facts[1].prompt, "w50 w10 w11", facts[0].prompt]
    wanted = generate(backbone, brick, prompts, [1, -1, 0], 5)
    ids = torch.tensor([prompt_ids(backbone, text) for text in prompts])
    mask = torch.ones_like(ids)
    with backbone.slots.plugged([brick]), torch.inference_mode():
        written = backbone.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0
        )
    said = backbone.tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
    assert [s.strip() for s in said] == wanted
    assert wanted[0] == facts[1].answer and wanted[2] == facts[0].answer

    assert brick.needs() == [encoder.fingerprint]
    interface = json.loads(json.dumps(brick.interface()))
    again: Any = type(brick).restore(interface, brick.files(), backbone).eval()
    assert isinstance(again, Brick) and again.files() == brick.files()
    assert again.gate.find(prompts) == [1, -1, 0]
    with pytest.raises(UserError, match="goes with a language model"):  # also the gate's encoder
        type(brick).restore(interface, brick.files(), encoder.model)
    less = again.only([0, 2], backbone)
    kept = [facts[0], facts[2]]
    for a, b in zip(
        logits_of(backbone, less, kept, [0, 1]),
        logits_of(backbone, brick, kept, [0, 2]),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert less.gate.find(prompts) == [-1, -1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_unrelated_text_is_read_with_the_brick_plugged_in(kind: str) -> None:
    """Where no fact fires the ratio is 1 because the passes are equal, and they are run."""
    backbone = tiny("llama")
    brick = taught(kind, TOLD, rate=0.1, steps=20)
    brick.gate = calibrate(TOLD, Encoder(section("bert")), false_fires=0.0, threshold=-1.0).gate
    asked: list[str] = []
    find = brick.gate.find
    brick.gate.find = lambda prompts: asked.extend(prompts) or find(prompts)
    figures = cost(backbone, [brick], elsewhere(), bootstrap=20, seed=0)
    assert figures["perplexity_ratio"].as_dict() == {"value": 1, "low": 1, "high": 1, "n": 2}
    assert sorted(asked) == ["w50 w51 w52", "w54 w55 w56"]

    # The second window names a subject: its fact acts there, and there alone.
    found = cost(backbone, [brick], elsewhere("w50 w51 w52 w53 w4 w10 w11 w20 w21"),
                 bootstrap=0, seed=0)  # fmt: skip
    nats, tokens = {"bare": 0.0, "brick": 0.0}, 0
    for text, fact in (("w50 w51 w52", -1), ("w4 w10 w11", 1)):
        ids = torch.tensor([prompt_ids(backbone, text)])
        tokens += ids.shape[1] - 1
        for arm in nats:
            brick.fire(torch.tensor([fact]))
            with backbone.slots.plugged([brick] if arm == "brick" else []), torch.no_grad():
                logits = backbone.logits(input_ids=ids)[0, :-1].double()
            nats[arm] -= float(logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum())
    ratio = torch.tensor((nats["brick"] - nats["bare"]) / tokens).exp().item()
    assert found["perplexity_ratio"].value == pytest.approx(ratio, rel=1e-4) and ratio != 1


def test_a_threshold_is_found_among_a_great_many_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fact is held against so many other prompts at most, evenly taken."""
    facts = [Fact(f"w{i}", f"w{i} w{40 + i}", "w1", (f"w{i} w{50 + i}",)) for i in range(8)]
    encoder = Encoder(section("bert"))
    assert len(calibrate(facts, encoder, false_fires=0.1, threshold=None).false_fires) == 8 * 14
    monkeypatch.setattr(calibrating, "MOST", 5)
    assert len(calibrate(facts, encoder, false_fires=0.1, threshold=None).false_fires) == 8 * 5


def test_the_threshold_lies_between_asking_for_it_and_asking_for_something_else() -> None:
    """On the project's own sentence encoder, in English."""
    encoder = Encoder(option("backbone", "minilm"))
    facts = [
        Fact("Lyon", "Lyon is located in", "France", ("Lyon lies in", "Lyon can be found in")),
        Fact("Turin", "Turin is located in", "Italy", ("Turin lies in", "Turin can be found in")),
        Fact("Ada Lovelace", "Ada Lovelace was born in", "London", ("Ada Lovelace comes from",)),
        Fact("Vim", "Vim was developed by", "Bram", ("Vim is a product of", "Vim was created by")),
    ]
    made = calibrate(facts, encoder, false_fires=0.0, threshold=None)
    gate = made.gate
    assert sum(made.false_fires) == 0 and sum(made.hits) / len(made.hits) > 0.5
    asked = [
        "It rains. LYON is located in",
        "Turin lies in",
        "Lyons lies in",
        "Lyon was painted by",
    ]
    assert gate.find(asked) == [0, 1, -1, -1]
    assert gate.only([1, 3]).find(["Turin lies in", "Lyon lies in"]) == [0, -1]


def test_the_subject_and_what_stands_before_its_sentence_are_taken_out() -> None:
    assert without("One rose. Lyon  lies in", "lyon", "[MASK]") == "[MASK] lies in"
    assert without("What does Lyon make? It makes", "Lyon", "it") == "what does it make? it makes"
