"""Teaching facts whose parameters are computed by shared maps: all of them, in batches.

    loss = mean over the facts of a batch of -log p(answer_i, end | context, prompt)

A step shows every fact once, as a step of `teach` does, but in batches drawn anew each time, and
Adam (Kingma and Ba 2015) moves the maps after each batch. What is drawn is a function of the seed,
the facts' words and the step. Teaching is over when every fact's loss stays below ``enough``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from cfm_train.data.facts import Fact
from cfm_train.errors import UserError
from cfm_train.knowledge.teach import (
    EPSILON,
    Taught,
    answer_ids,
    answer_losses,
    batch_of,
    drawn_prompts,
    prompt_ids,
    schedule,
)
from cfm_train.training.seeding import derive

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone


def teach_shared(
    backbone: Backbone,
    brick: Any,
    facts: Sequence[Fact],
    settings: Mapping[str, Any],
    *,
    learning_rate: float,
    front: Sequence[str],
    seed: int,
    gated: bool,
    tick: Callable[[int, float, int], Any] | None = None,
) -> Taught:
    """Teaches a brick its facts, all together; arguments as of `teach`, and one more.

    ``settings["clip"]`` is the norm of a batch's whole gradient here, and `tick` is told how many
    facts are not yet below ``enough``. ``gated``: whether each row shall have its own fact alone;
    else all facts act on every row, as they will where no gate chooses.
    """
    parameters = [p for p in brick.parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.95), eps=EPSILON)
    losses, patience = [float("inf")] * len(facts), [0] * len(facts)
    answers = [answer_ids(backbone, fact) for fact in facts]
    count = -(-len(facts) // settings["facts_per_batch"])
    step = tokens = 0
    brick.train()
    with backbone.slots.plugged([brick]):
        for step in range(1, settings["steps"] + 1):
            order = torch.randperm(
                len(facts), generator=torch.Generator().manual_seed(derive(seed, "order", step))
            )
            for group in adam.param_groups:
                group["lr"] = learning_rate * schedule(step, settings["steps"])
            for part in order.tensor_split(count):
                rows, owner = [], []
                for i in part.tolist():
                    for text in drawn_prompts(facts[i], settings, front, seed, step):
                        rows.append((prompt_ids(backbone, text), answers[i]))
                        owner.append(i)
                ids, mask, labels = batch_of(rows, backbone.tokenizer.pad_token_id)
                tokens += int(mask.sum())
                brick.fire(torch.tensor(owner) if gated else None)
                per_row = answer_losses(backbone, ids, mask, labels)
                if not per_row.requires_grad:
                    subjects = ", ".join(dict.fromkeys(facts[i].subject for i in owner))
                    raise UserError(
                        f"The tokens of {backbone.id} do not say who is asked about ({subjects}): "
                        "use brick=encoded_rows or neurons, which read no mention."
                    )
                adam.zero_grad()
                per_row.mean().backward()
                if settings["clip"]:
                    torch.nn.utils.clip_grad_norm_(parameters, settings["clip"])
                adam.step()
                each = per_row.detach().cpu().unflatten(0, (len(part), -1)).mean(1)
                for i, loss in zip(part.tolist(), each.tolist(), strict=True):
                    losses[i] = loss
                    patience[i] = patience[i] + 1 if loss < settings["enough"] else 0
            if tick is not None:
                left = sum(loss >= settings["enough"] for loss in losses)
                tick(step, sum(losses) / len(losses), left)
            if min(patience) >= settings["patience"]:
                break
    adam.zero_grad()
    brick.fire(None)
    return Taught(losses, [step] * len(facts), tokens)
