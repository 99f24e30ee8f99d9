"""Add facts to a brick that computes them from vectors: a new brick, nothing trained.

The encoder that the brick was made with reads the new facts; maps and the others' vectors stay, and
so do the others' answers, to the bit; the run tries it. The gate takes the new prompts in and keeps
its threshold. Asked are the new facts, of the brick that knows the others too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.backbone.fingerprint import file_hash, fingerprint
from cfm_train.backbone.spec import resolve
from cfm_train.config.signature import kinds
from cfm_train.data.facts import Fact, from_taught, normalised
from cfm_train.data.facts import fingerprint as facts_fingerprint
from cfm_train.errors import UserError
from cfm_train.knowledge.stated import facts_of
from cfm_train.library.card import Card, check_name
from cfm_train.operations.selection import Selection, select
from cfm_train.operations.teach import read_text
from cfm_train.tracking.wandb_setting import resolve_mode


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        selection: the brick and its backbone.
        card: the brick's card.
        facts: the facts to add.
        unrelated: text that has nothing to do with them; empty for none.
        fingerprints: content hashes for the config hash.
    """

    selection: Selection
    card: Card
    facts: list[Fact]
    unrelated: str
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Finds the brick, its encoder and the facts, without torch.

    Raises:
        UserError: the brick's facts have to be taught, or it knows one of the prompts already.
    """
    check_name(config["name"])
    resolve_mode(config["tracking"]["mode"])
    selection = select(config)
    card = selection.card_of(selection.trees[0])
    if len(selection.trees) > 1 or card is None:
        raise UserError("bricks: facts are added to one brick, as in bricks=[capitals].")
    computed = kinds("bricks", "ByVector")
    if card.kind not in computed or not card.interface.get("facts"):
        raise UserError(
            f"{card.ref} ({card.kind}) computes no facts: teach them with recipe=knowledge/facts, "
            f"or make a brick that takes more later (brick={' or '.join(computed)})."
        )
    described, gate = card.interface["encoder"], card.interface["gate"]
    encoded: dict[str, str] = {}
    readers = [(one["section"], one["fingerprint"]) for one in [described] if one]
    readers += [(one["encoder"], one["fingerprint"]) for one in [gate] if one]
    for section, expected in readers:
        encoder = resolve(section, "sentence_encoder")
        encoded["encoder"] = fingerprint(encoder.folder)
        if encoded["encoder"] != expected:
            raise UserError(
                f"{card.ref} was read with another '{encoder.id}' than the one here: install that "
                "one, or teach the facts again."
            )
    facts = facts_of(config["data"])
    width = card.interface["width"] if described is None else 0
    if len(facts[0].vector) != width:
        wanted = f"vectors of {width} numbers" if width else "no vectors: its encoder makes them"
        raise UserError(
            f"{facts[0].at}: the fact's vector has {len(facts[0].vector)} numbers, and {card.ref} "
            f"takes {wanted}."
        )
    known = {
        normalised(prompt) for old in card.interface["facts"] for prompt in from_taught(old).prompts
    }
    for fact in facts:
        for prompt in (*fact.prompts, *fact.held_out):
            if normalised(prompt) in known:
                raise UserError(
                    f"{fact.at}: {card.ref} knows the prompt '{prompt}' already: leave it out, or "
                    "forget it first (recipe=knowledge/forget)."
                )
    unrelated = read_text(config["data"]["unrelated"])
    selection.library.check_writable()
    fingerprints = {
        **selection.fingerprints,
        **encoded,
        "data/facts": facts_fingerprint(facts),
    }
    if config["data"]["unrelated"]:
        fingerprints["data/unrelated"] = file_hash(Path(config["data"]["unrelated"]).expanduser())
    return Inputs(selection, card, facts, unrelated, fingerprints)


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Makes the larger brick, tries that the rest is as it was, judges what is new, and stores."""
    from tqdm import tqdm

    from cfm_train.bricks.fact_gate import Encoder
    from cfm_train.bricks.stored import open_brick
    from cfm_train.knowledge.fact_figures import judge, passes
    from cfm_train.operations.changed import (
        changed_entries,
        others_check,
        same_answers,
        store_changed,
    )
    from cfm_train.operations.setting import open_backbone, tracked, unchanged
    from cfm_train.operations.taught import given, prompts_found, samples_of, sizes, windows

    selection, old = inputs.selection, inputs.card
    section = {**selection.section, "dtype": "float32"}
    backbone, before = open_backbone(selection.backbone, section)
    less: Any = open_brick(old, selection.library, backbone)
    encoder = None
    if less.encoder is not None:
        encoder = Encoder(less.encoder["section"], less.encoder["fingerprint"])
    new_facts = [fact.taught() for fact in inputs.facts]
    more = less.with_more(new_facts, encoder, backbone, given(inputs.facts))
    more.eval().requires_grad_(False)
    known = [from_taught(fact) for fact in less.facts]
    with tracked(config, folder) as wandb:
        old_ones = range(len(known))
        same_said = same_answers(backbone, more, old_ones, less, old_ones, known)
        checks = {others_check(more): same_said}
        if more.gate is not None:
            alone = more.gate.only(range(len(known)))
            checks["the gate finds the others as it did"] = prompts_found(
                more.gate, known
            ) == prompts_found(alone, known)
        unrelated = windows(backbone, inputs.unrelated, config["evaluation"])
        total = passes(inputs.facts, unrelated)
        with tqdm(total=total, desc="judged", unit="prompt", leave=False) as bar:
            figures, samples = judge(
                backbone,
                more,
                [*known, *inputs.facts],
                unrelated=unrelated,
                bootstrap=config["evaluation"]["bootstrap"],
                seed=config["seed"],
                first=len(known),
                tick=bar.update,
            )
        figures |= sizes(more)
        same = unchanged(backbone, before, selection.backbone)
        told = {"name": "facts", "fingerprint": inputs.fingerprints["data/facts"], "licence": None}
        data = [*old.data, told]
        card = store_changed(
            config, selection, old, more, backbone, folder, wandb, data=data, metrics=figures
        )
        wandb.summary({name: figure["value"] for name, figure in figures.items()})
    print(f"{card.ref} knows {len(more)} facts, {len(inputs.facts)} of them new")
    return changed_entries(card, selection, more, backbone, same, checks) | {
        "metrics": figures,
        "samples": samples_of(samples),
        "wandb": wandb.as_record(),
    }
