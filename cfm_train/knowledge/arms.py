"""Arms: the same questions asked of the bare backbone, with the text in the prompt, with the brick,
and with both.

    bare     [question]            text     [passage, line break, question]
    brick    [question] + brick    both     [passage, line break, question] + brick

The passage is the one that a question is from (or, of a person's question, the one that fits it
best), so the text arm is retrieval that never misses. Each answer is scored twice: teacher-forced
(nats for each of its tokens, share of its tokens that would have been said), and written freely and
greedily, where it is right if the text begins with it. All arms have the same questions, so what
one gains over another is compared question by question.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from cfm_train.backbone.load import Backbone
from cfm_train.backbone.plugs import Pluggable
from cfm_train.data.batches import in_order
from cfm_train.data.encode import Encoded
from cfm_train.data.tasks import IGNORED
from cfm_train.evaluation.generation import ROWS, write
from cfm_train.evaluation.intervals import Score, intervals
from cfm_train.knowledge.tokens import Item, Reader, shown
from cfm_train.training.dataset import evaluation_tokens, make_batch
from cfm_train.training.objectives import next_token_logits

METRICS = ("loss", "token_accuracy", "exact_match")
#: Which arm is compared with which: what the brick knows, what it adds to the text, what it lacks.
MARGINS = (("brick", "bare"), ("both", "text"), ("brick", "text"))


@dataclass(frozen=True)
class Answered:
    """What one arm made of the questions, in their order.

    Attributes:
        nats: sum of the loss on the answer's tokens, float64 ``[questions]``.
        tokens: how many there are, int64 ``[questions]``.
        right: how many of them would have been said, int64 ``[questions]``.
        exact: whether the answer was written, float64 ``[questions]``; None where none was.
        texts: what was written.
    """

    nats: np.ndarray
    tokens: np.ndarray
    right: np.ndarray
    exact: np.ndarray | None
    texts: list[str]

    def statistics(self) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        """Each metric as a function of the questions' weights ``[resamples, questions]``."""
        found: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "loss": lambda w: (w @ self.nats) / (w @ self.tokens),
            "token_accuracy": lambda w: (w @ self.right) / (w @ self.tokens),
        }
        exact = self.exact
        if exact is not None:
            found["exact_match"] = lambda w: (w @ exact) / w.sum(axis=1)
        return found


def ask(
    backbone: Backbone,
    items: Sequence[Item],
    bricks: Sequence[Pluggable],
    *,
    generate: bool,
    progress: Callable[[int], Any] | None = None,
) -> Answered:
    """Asks questions of the backbone with some bricks plugged in.

    Args:
        backbone: a language model.
        items: the questions with their answers, see `Reader.question` and `shown`.
        bricks: what is plugged in.
        generate: whether answers are written freely, too.
        progress: called with the number of questions after each batch, twice for each question
            where answers are written.
    """
    nats, right = np.zeros(len(items)), np.zeros(len(items), np.int64)
    tokens = np.array([len(item.ids) - item.start for item in items], np.int64)
    texts = [""] * len(items)
    encoded = _encoded(items)
    pad = backbone.tokenizer.pad_token_id
    with backbone.slots.plugged(bricks), torch.inference_mode():
        for rows in in_order(
            encoded.lengths,
            tokens_per_batch=evaluation_tokens(backbone.device),
            rows_per_batch=256,
        ):
            batch = make_batch("questions", encoded, rows, pad)
            moved = {k: v.to(backbone.device) for k, v in batch.items() if torch.is_tensor(v)}
            logits, targets = next_token_logits(backbone, moved)
            losses = F.cross_entropy(
                logits.float().transpose(1, 2), targets, reduction="none", ignore_index=IGNORED
            )
            nats[rows] = losses.double().sum(dim=1).cpu().numpy()
            right[rows] = (logits.argmax(dim=-1) == targets).sum(dim=1).cpu().numpy()
            if progress is not None:
                progress(len(rows))
        if generate:
            order = np.argsort([item.start for item in items], kind="stable")
            for start in range(0, len(order), ROWS):
                rows = order[start : start + ROWS]
                prompts = [items[i].ids[: items[i].start] for i in rows]
                for i, text in zip(
                    rows, write(backbone, prompts, int(tokens.max()) + 2), strict=True
                ):
                    texts[i] = text
                if progress is not None:
                    progress(len(rows))
    exact = None
    if generate:
        answers = [item.row["text"][1] for item in items]
        exact = np.array([begins(t, a) for t, a in zip(texts, answers, strict=True)], np.float64)
    return Answered(nats, tokens, right, exact, texts)


def _encoded(items: Sequence[Item]) -> Encoded:
    from cfm_train.data.encoders import flat
    from cfm_train.knowledge.tokens import marks

    ids, offsets = flat([item.ids for item in items])
    arrays = {"input_ids": ids, "offsets": offsets}
    arrays["token_labels"] = flat([marks(item) for item in items])[0]
    return Encoded(arrays, [item.row for item in items], 0, 0)


def begins(text: str, answer: str) -> bool:
    """Whether a text begins with an answer and no word goes on where it ends."""
    said, wanted = (" ".join(part.split()) for part in (text, answer))
    return said.startswith(wanted) and not re.match(r"\w", said[len(wanted) :])


def all_arms(
    backbone: Backbone,
    reader: Reader,
    bricks: Sequence[Pluggable],
    *,
    generate: bool,
    split: str = "test",
    more: Mapping[str, Sequence[Pluggable]] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Answered]:
    """The questions of a split in every arm, by its name.

    Args:
        backbone: a language model, nothing plugged.
        reader: the documents.
        bricks: what is judged.
        generate: whether answers are written freely, too.
        split: which questions.
        more: other sets of bricks, asked without the text.
        progress: see `ask`.
    """
    with_text, plain = questions_of(reader, split)
    asked: dict[str, tuple[list[Item], Sequence[Pluggable]]] = {
        "brick": (plain, bricks),
        "bare": (plain, []),
        "text": (with_text, []),
        "both": (with_text, bricks),
        **{name: (plain, others) for name, others in (more or {}).items()},
    }
    return {
        name: ask(backbone, items, plugged, generate=generate, progress=progress)
        for name, (items, plugged) in asked.items()
    }


def questions_of(reader: Reader, split: str) -> tuple[list[Item], list[Item]]:
    """The questions of a split with the passage before each, and without."""
    questions = reader.documents.questions[split]
    front = len(reader.front)
    with_text = [shown(reader.question(q, context=True), front) for q in questions]
    return with_text, [reader.question(q) for q in questions]


def scores(answered: Mapping[str, Answered], *, bootstrap: int, seed: int) -> dict[str, Score]:
    """``<arm>/<metric>`` of each arm, and ``<arm> over <arm>/<metric>`` of what one gains.

    All from the same resamples of the questions, so that a gain is paired.

    Args:
        answered: the arms; ``bare``, ``text``, ``brick`` and ``both`` among them.
        bootstrap: number of resamples.
        seed: seed of the draws.
    """
    statistics: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    for arm, one in answered.items():
        statistics |= {f"{arm}/{metric}": f for metric, f in one.statistics().items()}
    margins = [*MARGINS, *((name, "brick") for name in answered if name not in NAMES)]
    for arm, other in margins:
        for metric in answered[arm].statistics():
            a, b = statistics[f"{arm}/{metric}"], statistics[f"{other}/{metric}"]
            statistics[f"{arm} over {other}/{metric}"] = _difference(a, b)
    count = len(answered["brick"].nats)
    return intervals(statistics, np.ones(count, np.int64), bootstrap=bootstrap, seed=seed)


NAMES = ("bare", "text", "brick", "both")


def _difference(
    a: Callable[[np.ndarray], np.ndarray], b: Callable[[np.ndarray], np.ndarray]
) -> Callable[[np.ndarray], np.ndarray]:
    return lambda weights: a(weights) - b(weights)
