"""Teaching facts: all of a group in one batch, each with parameters, loss and optimiser of its own.

    loss_i = mean over i's prompts of -log p(answer_i, end | context, prompt)

Facts never meet: row r of a batch carries the parameters of its own fact alone, gradients are
clipped fact by fact, Adam works number by number, and what is drawn for a fact is a function of the
seed, its own words and the step. So a fact learns the same alone as among others, up to rounding.
A fact whose loss stays below ``enough`` for some steps leaves the batch.

Contexts are texts that the bare backbone writes itself; now and then one stands in front of a
prompt (as in ROME, Meng et al. 2022, arXiv 2202.05262), so that the fact holds behind other text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cfm_train.data.facts import Fact
from cfm_train.training.seeding import derive

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone

#: A gradient smaller than this counts as none: Adam would make a full step of rounding noise.
EPSILON = 1e-7


@dataclass(frozen=True)
class Taught:
    """What became of a group of facts.

    Attributes:
        losses: the last loss of each fact, nats per token.
        steps: how many steps each took.
        tokens: how many tokens went through the backbone.
    """

    losses: list[float]
    steps: list[int]
    tokens: int


def answer_ids(backbone: Backbone, fact: Fact) -> list[int]:
    """Token ids of an answer behind its prompt, and the end of the text."""
    ids: list[int] = backbone.tokenizer(" " + fact.answer, add_special_tokens=False)["input_ids"]
    end = backbone.tokenizer.eos_token_id
    return ids if end is None else [*ids, end]


def prompt_ids(backbone: Backbone, text: str) -> list[int]:
    """Token ids of a prompt, with what the tokenizer puts in front of a text."""
    ids: list[int] = backbone.tokenizer(text)["input_ids"]
    end = backbone.tokenizer.eos_token_id
    return ids[:-1] if len(ids) > 1 and ids[-1] == end else ids


@torch.inference_mode()
def contexts(backbone: Backbone, count: int, tokens: int, seed: int) -> list[str]:
    """Texts that the bare backbone writes, to stand in front of prompts."""
    if not count:
        return []
    tokenizer = backbone.tokenizer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((count, 1), start or 0, device=backbone.device)
    torch.manual_seed(derive(seed, "contexts"))
    with backbone.slots.plugged([]):
        written = backbone.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=True,
            top_k=50,
            pad_token_id=tokenizer.pad_token_id,
        )
    texts = (" ".join(t.split()) for t in tokenizer.batch_decode(written, skip_special_tokens=True))
    return [text.rstrip(" .,;:") + "." for text in texts if text]


def teach(
    backbone: Backbone,
    brick: Any,
    facts: Sequence[Fact],
    settings: Mapping[str, Any],
    *,
    learning_rate: float,
    front: Sequence[str],
    seed: int,
    tick: Callable[[int, float, int], Any] | None = None,
) -> Taught:
    """Teaches a brick its facts, one group at once.

    Args:
        backbone: the backbone, nothing plugged.
        brick: built for these facts, in this order; its parameters are changed.
        facts: the facts.
        settings: the ``teaching`` section.
        learning_rate: Adam's, constant to a third of the steps, then falling to a tenth.
        front: texts that may stand in front of a prompt.
        seed: decides everything that is drawn.
        tick: told step, mean loss and how many facts are still being taught.
    """
    parameters = [p for p in brick.parameters() if p.requires_grad]
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    losses, steps = [float("inf")] * len(facts), [0] * len(facts)
    patience = [0] * len(facts)
    answers = [answer_ids(backbone, fact) for fact in facts]
    known: dict[str, list[int]] = {}
    active, tokens = list(range(len(facts))), 0
    with backbone.slots.plugged([brick]):
        for step in range(1, settings["steps"] + 1):
            rows, owner = [], []
            for i in active:
                for text in drawn_prompts(facts[i], settings, front, seed, step):
                    if text not in known:
                        known[text] = prompt_ids(backbone, text)
                    rows.append((known[text], answers[i]))
                    owner.append(i)
            ids, mask, labels = batch_of(rows, backbone.tokenizer.pad_token_id)
            tokens += int(mask.sum())
            brick.fire(torch.tensor(owner))
            per_row = answer_losses(backbone, ids, mask, labels)
            each = torch.zeros(len(facts), device=per_row.device)
            each = each.index_add(0, torch.tensor(owner, device=per_row.device), per_row)
            each = each / settings["prompts_per_step"]
            gradients = torch.autograd.grad(each.sum(), parameters)
            rate = learning_rate * schedule(step, settings["steps"])
            _adam(parameters, gradients, first, second, active, step, rate, settings["clip"])
            for i in active:
                losses[i], steps[i] = float(each[i].detach()), step
                patience[i] = patience[i] + 1 if losses[i] < settings["enough"] else 0
            if tick is not None:
                tick(step, sum(losses[i] for i in active) / len(active), len(active))
            active = [i for i in active if patience[i] < settings["patience"]]
            if not active:
                break
    brick.fire(None)
    return Taught(losses, steps, tokens)


def drawn_prompts(
    fact: Fact, settings: Mapping[str, Any], front: Sequence[str], seed: int, step: int
) -> list[str]:
    """The prompts of a fact in a step; its own words, the seed and the step decide."""
    drawn = []
    prompts = fact.prompts
    for number in range(settings["prompts_per_step"]):
        draw = derive(seed, fact.subject, fact.prompt, step, number)
        # Every prompt comes up as often as any other; contexts are drawn.
        at = (step - 1) * settings["prompts_per_step"] + number
        text = prompts[at % len(prompts)]
        share = (draw % 10_000) / 10_000
        if front and share < settings["context_share"]:
            text = f"{front[(draw // 10_000) % len(front)]} {text}"
        drawn.append(text)
    return drawn


def batch_of(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels ``[batch, seq]`` of prompts with answers; labels are -100 elsewhere."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor([*prompt, *answer])
        mask[i, :end] = 1
        labels[i, len(prompt) : end] = torch.tensor(answer)
    return ids, mask, labels


def answer_losses(backbone: Backbone, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of each row's answer, ``[batch]`` nats per token."""
    device = backbone.device
    hidden = backbone.hidden_states(ids.to(device), mask.to(device))
    asked = (labels[:, 1:] != -100).to(device)
    logits = backbone.model.get_output_embeddings()(hidden[:, :-1][asked]).float()
    right = labels[:, 1:].to(device)[asked]
    lost = torch.nn.functional.cross_entropy(logits, right, reduction="none")
    row = asked.nonzero()[:, 0]
    total = torch.zeros(len(ids), device=device).index_add(0, row, lost)
    return total / asked.sum(1)


def schedule(step: int, steps: int) -> float:
    """1 for the first third, then down to 0.1."""
    part = max(0.0, (step - steps / 3) / (2 * steps / 3))
    return 1 - 0.9 * part


def _adam(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    active: Sequence[int],
    step: int,
    rate: float,
    clip: float,
) -> None:
    """Adam (Kingma and Ba 2015) on the facts that are still taught, clipped fact by fact."""
    index = torch.tensor(active, device=parameters[0].device)
    picked = [gradient[index] for gradient in gradients]
    norm = torch.stack([g.flatten(1).square().sum(1) for g in picked]).sum(0).sqrt()
    factor = (clip / norm.clamp_min(1e-12)).clamp_max(1.0) if clip else torch.ones_like(norm)
    for p, g, m, v in zip(parameters, picked, first, second, strict=True):
        g = g * factor.reshape(-1, *[1] * (g.ndim - 1))
        m[index] = 0.9 * m[index] + 0.1 * g
        v[index] = 0.95 * v[index] + 0.05 * g.square()
        update = (m[index] / (1 - 0.9**step)) / ((v[index] / (1 - 0.95**step)).sqrt() + EPSILON)
        with torch.no_grad():
            p[index] -= rate * update
