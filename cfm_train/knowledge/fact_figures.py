"""What a brick of facts comes to: answers in greedy generation, locality, and unrelated text.

Four arms answer the same prompts: the bare backbone, the fact's text in front of the prompt, the
brick, and both. Which fact it is, the gate says, for the text as for the brick.

    exact_match   what is written up to the end of text is the answer and nothing else
    says_answer   it begins with the answer (a backbone that was told nothing goes on writing)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cfm_train.data.facts import Fact, normalised
from cfm_train.evaluation.intervals import paired_interval
from cfm_train.evaluation.text import exact_match
from cfm_train.knowledge.teach import answer_ids, batch_of, prompt_ids
from cfm_train.knowledge.unrelated import cost

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.data.encode import Encoded

ROWS = 32
ARMS = ("bare", "text", "brick", "both")
SETS = ("prompt", "paraphrases", "held_out")
Figures = dict[str, dict[str, Any]]
Tick = Callable[[int], Any]


def judge(
    backbone: Backbone,
    brick: Any,
    facts: Sequence[Fact],
    *,
    unrelated: Encoded | None,
    bootstrap: int,
    seed: int,
    first: int = 0,
    tick: Tick | None = None,
) -> tuple[Figures, list[dict[str, Any]]]:
    """All figures, and samples of what is said.

    Args:
        backbone: the backbone.
        brick: the brick of these facts, with its gate.
        facts: the facts in the brick's order.
        unrelated: text that has nothing to do with them; None for none.
        bootstrap, seed: of the intervals.
        first: the facts before it are there, and not asked about.
        tick: told how many prompts have been answered, as often as `passes` counts.
    """
    figures: Figures = {}
    samples: list[dict[str, Any]] = []
    own = list(enumerate(facts))[first:]
    longest = max(len(answer_ids(backbone, fact)) for _, fact in own) + 2

    def mean(name: str, values: Sequence[float], minus: Sequence[float] | None = None) -> None:
        if len(values):
            base = np.zeros(len(values)) if minus is None else np.asarray(minus)
            score = paired_interval(np.asarray(values), base, bootstrap=bootstrap, seed=seed)
            figures[name] = score.as_dict()

    for name in SETS:
        asked = [(text, at) for at, fact in own for text in _prompts(fact, name)]
        if not asked:
            continue
        found = _find(brick, [text for text, _ in asked])
        if found is not None:
            hits = [float(f == at) for f, (_, at) in zip(found, asked, strict=True)]
            mean(f"{name}/gate finds the fact", hits)
        told = [at for _, at in asked] if found is None else found
        says: dict[str, list[float]] = {}
        for arm in ARMS:
            texts = [
                _told(facts[f], text) if f >= 0 and arm in ("text", "both") else text
                for f, (text, _) in zip(told, asked, strict=True)
            ]
            without = arm in ("bare", "text")
            said = generate(backbone, brick, texts, found, longest, tick, bare=without)
            right = [(s, facts[at].answer) for s, (_, at) in zip(said, asked, strict=True)]
            mean(f"{name}/{arm}/exact_match", [exact_match(s, answer) for s, answer in right])
            says[arm] = [float(_says(s, answer)) for s, answer in right]
            mean(f"{name}/{arm}/says_answer", says[arm])
            if arm == "brick":
                samples += [
                    {"input": text, "prediction": s, "reference": facts[at].answer, "task": name}
                    for s, (text, at) in list(zip(said, asked, strict=True))[:3]
                ]
        for arm in ("brick", "both"):
            mean(f"{name}/{arm} - text/says_answer", says[arm], says["text"])
        pairs = [(text, answer_ids(backbone, facts[at])) for text, at in asked]
        forced = _forced(backbone, brick, pairs, found, tick)
        mean(f"{name}/brick/teacher_forced_accuracy", forced)
    _locality(backbone, brick, facts[first:], longest, mean, tick)
    if unrelated is not None:
        # Plugged in like any brick: the gate reads each window, and every pass is run.
        elsewhere = cost(
            backbone, [brick], unrelated, bootstrap=bootstrap, seed=seed, progress=tick
        )
        figures |= {f"unrelated/{name}": score.as_dict() for name, score in elsewhere.items()
                    if math.isfinite(score.high)}  # fmt: skip
    return figures, samples


def passes(facts: Sequence[Fact], unrelated: Encoded | None) -> int:
    """How many prompts `judge` answers in all."""
    asked = sum(len(_prompts(fact, name)) for fact in facts for name in SETS)
    beside = sum(len(fact.others) + len(fact.neighbours) for fact in facts)
    beside += 0 if unrelated is None else len(unrelated)
    return asked * (len(ARMS) + 1) + 2 * beside


def _prompts(fact: Fact, name: str) -> Sequence[str]:
    return [fact.prompt] if name == "prompt" else list(getattr(fact, name))


def _told(fact: Fact, prompt: str) -> str:
    return f"{fact.prompt} {fact.answer}. {prompt}"


def _find(brick: Any, prompts: Sequence[str]) -> list[int] | None:
    """The fact of each prompt by the gate; without a gate all act, so there is nothing to find."""
    return None if brick.gate is None else brick.gate.find(prompts)


def _locality(
    backbone: Backbone,
    brick: Any,
    facts: Sequence[Fact],
    longest: int,
    mean: Callable[[str, Sequence[float]], None],
    tick: Tick | None,
) -> None:
    others = [(text, fact.answer) for fact in facts for text in fact.others]
    if others:
        texts = [text for text, _ in others]
        found = _find(brick, texts)
        for arm in ("bare", "brick"):
            said = generate(backbone, brick, texts, found, longest, tick, bare=arm == "bare")
            taught = [float(_says(s, answer)) for s, (_, answer) in zip(said, others, strict=True)]
            mean(f"others/{arm}/says the taught answer", taught)
    near = [text for fact in facts for text in fact.neighbours]
    if near:
        bare = next_tokens(backbone, brick, near, None, tick, bare=True)
        there = next_tokens(backbone, brick, near, _find(brick, near), tick)
        mean("neighbours/argmax unchanged", (bare == there).float().tolist())


def _says(said: str, answer: str) -> bool:
    """Whether what is said begins with the answer."""
    said, answer = normalised(said), normalised(answer)
    return said.startswith(answer) and not said[len(answer) : len(answer) + 1].isalnum()


def _batches(backbone: Backbone, prompts: Sequence[str], fired: Sequence[int] | None) -> Any:
    """Prompts of a batch as ids and mask ``[batch, seq]``, padded on the left, with their facts."""
    for start in range(0, len(prompts), ROWS):
        ids = [prompt_ids(backbone, text) for text in prompts[start : start + ROWS]]
        width = max(map(len, ids))
        batch = torch.full((len(ids), width), backbone.tokenizer.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(batch)
        for i, one in enumerate(ids):
            batch[i, width - len(one) :] = torch.tensor(one)
            mask[i, width - len(one) :] = 1
        facts = None if fired is None else torch.tensor(fired[start : start + ROWS])
        yield batch.to(backbone.device), mask.to(backbone.device), facts


@torch.inference_mode()
def generate(
    backbone: Backbone,
    brick: Any,
    prompts: Sequence[str],
    fired: Sequence[int] | None,
    longest: int,
    tick: Tick | None = None,
    *,
    bare: bool = False,
) -> list[str]:
    """What is written greedily behind prompts, up to the end of the text.

    Args:
        backbone: the backbone.
        brick: the brick.
        prompts: the prompts.
        fired: the fact that acts on each, -1 for none; None where there is no gate and all act.
        longest: most new tokens.
        tick: told how many prompts have been answered.
        bare: leave the brick out.
    """
    said: list[str] = []
    for ids, mask, facts in _batches(backbone, prompts, fired):
        brick.fire(facts)
        with backbone.slots.plugged([] if bare else [brick]):
            written = backbone.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=longest,
                do_sample=False,
                num_beams=1,
                pad_token_id=backbone.tokenizer.pad_token_id,
            )
        new = written[:, ids.shape[1] :]
        said += [s.strip() for s in backbone.tokenizer.batch_decode(new, skip_special_tokens=True)]
        if tick is not None:
            tick(len(ids))
    brick.fire(None)
    return said


@torch.inference_mode()
def logits_of(
    backbone: Backbone, brick: Any, facts: Sequence[Fact], fired: Sequence[int]
) -> list[Tensor]:
    """Logits ``[seq, vocabulary]`` of each fact's prompt with its answer, one at a time."""
    found = []
    for fact, at in zip(facts, fired, strict=True):
        ids = [*prompt_ids(backbone, fact.prompt), *answer_ids(backbone, fact)]
        brick.fire(torch.tensor([at]))
        with backbone.slots.plugged([brick]):
            found.append(backbone.logits(input_ids=torch.tensor([ids], device=backbone.device))[0])
    brick.fire(None)
    return found


@torch.inference_mode()
def next_tokens(
    backbone: Backbone,
    brick: Any,
    prompts: Sequence[str],
    fired: Sequence[int] | None,
    tick: Tick | None = None,
    *,
    bare: bool = False,
) -> Tensor:
    """The likeliest next token of each prompt, ``[prompts]`` int64."""
    found = []
    for ids, mask, facts in _batches(backbone, prompts, fired):
        brick.fire(facts)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with backbone.slots.plugged([] if bare else [brick]):
            hidden = backbone.hidden_states(ids, mask, position_ids=positions)[:, -1]
            found.append(backbone.model.get_output_embeddings()(hidden).argmax(-1).cpu())
        if tick is not None:
            tick(len(ids))
    brick.fire(None)
    return torch.cat(found)


@torch.inference_mode()
def _forced(
    backbone: Backbone,
    brick: Any,
    asked: Sequence[tuple[str, list[int]]],
    fired: Sequence[int] | None,
    tick: Tick | None,
) -> list[float]:
    """The share of each answer's tokens that are right behind the right ones before them."""
    shares: list[float] = []
    for start in range(0, len(asked), ROWS):
        part = asked[start : start + ROWS]
        rows = [(prompt_ids(backbone, text), answer) for text, answer in part]
        ids, mask, labels = batch_of(rows, backbone.tokenizer.pad_token_id)
        brick.fire(None if fired is None else torch.tensor(fired[start : start + ROWS]))
        with backbone.slots.plugged([brick]):
            hidden = backbone.hidden_states(ids.to(backbone.device), mask.to(backbone.device))
            where = labels[:, 1:] != -100
            logits = backbone.model.get_output_embeddings()(hidden[:, :-1][where])
        right = (logits.argmax(-1).cpu() == labels[:, 1:][where]).double()
        total = torch.zeros(len(part), dtype=torch.float64)
        total = total.index_add(0, where.nonzero()[:, 0], right)
        shares += (total / where.sum(1)).tolist()
        if tick is not None:
            tick(len(part))
    brick.fire(None)
    return shares
