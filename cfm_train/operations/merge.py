"""Make one brick from several; the new brick names its parents with their versions.

With ``search`` the weights are found first (`sought`, `bench`, `found`); with ``heads=refit`` the
merge gets heads of its own (`refit`). Either way it is judged on test rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.backbone.fingerprint import tokenizer_hash
from cfm_train.config import merging
from cfm_train.configuration.expression import BrickRef, Call, Expression
from cfm_train.data.sources import Checked, data_fingerprints
from cfm_train.errors import UserError
from cfm_train.library.card import Card, check_name
from cfm_train.library.sidecar import Sidecar
from cfm_train.merging import sidecars
from cfm_train.merging.weights import check_filters, check_matched, check_weights
from cfm_train.operations import refit
from cfm_train.operations.selection import Selection, select
from cfm_train.operations.sought import Sought
from cfm_train.operations.sought import check as check_search
from cfm_train.tracking.wandb_setting import resolve_mode

#: Kinds that stand for a configuration: what they are made of decides.
COMPOSED = frozenset({"stitch"})


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        selection: bricks and backbone.
        section: the merge's parameters.
        weights: one for each brick; None for a rule that takes none.
        statistic: the statistics that the rule needs; None for none.
        sidecars: where those of each brick lie.
        sought: what finding weights needs; None where they are given.
        refitted: the tasks that get new heads.
        fingerprints: content hashes for the config hash.
    """

    selection: Selection
    section: dict[str, Any]
    weights: Any
    statistic: str | None
    sidecars: list[Sidecar]
    sought: Sought | None
    refitted: dict[str, Checked]
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Finds bricks and backbone, without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_name(config["name"])
    resolve_mode(config["tracking"]["mode"])
    selection = select(config)
    section = dict(config["merge"])
    if section["seed"] is None:
        section["seed"] = config["seed"]
    rule, count = section["rule"], len(selection.trees)
    merging.check_count(rule, count)
    weights = merging.default_weights(config["weights"], count, section["equal"], rule)
    check_weights(weights, count)
    filters = check_filters(section["filters"], count)
    check_cards(list(selection.cards.values()), section)
    if {card.kind for card in selection.cards.values()} == {"lora"}:
        check_matched(filters, {site for c in selection.cards.values() for site in c.sites})
    fingerprints = dict(selection.fingerprints)
    kind, found = sidecars.needed_by(rule), []
    if kind is not None:
        found = sidecars.find(kind, selection.trees, selection.cards, selection.library)
        fingerprints |= {f"{kind}/{i}": sidecars.fingerprint(f, kind) for i, f in enumerate(found)}
    sought = check_search(config, selection, section)
    if sought is not None:
        fingerprints |= sought.fingerprints
    refitted = refit.check(config, selection, sought.tasks if sought is not None else None)
    fingerprints |= data_fingerprints(refitted)
    selection.library.check_writable()
    given = None if section["equal"] is None else weights
    return Inputs(selection, section, given, kind, found, sought, refitted, fingerprints)


def tree_of(
    selection: Selection, section: Mapping[str, Any], weights: Any, *, new_heads: bool
) -> Call:
    """The merge with all its parameters written out; ``heads`` where they are not the parents'."""
    parameters = {k: v for k, v in section.items() if k != "rule"}
    if new_heads:
        parameters["heads"] = "refit"
    if weights is not None:
        parameters["weights"] = weights
    return Call("merge", section["rule"], tuple(selection.trees), tuple(parameters.items()))


def check_cards(cards: Sequence[Card], section: Mapping[str, Any]) -> None:
    """Refuses what can be seen from the cards: kinds and options that do not go together.

    Raises:
        UserError: the bricks have no common form in the space.
    """
    for card in cards:
        if card.interface.get("facts"):
            raise UserError(
                f"{card.ref} holds facts, each with parameters of its own, which are no update to "
                "be averaged: teach all of them in one run (recipe=knowledge/facts)."
            )
    kinds = sorted({card.kind for card in cards} - COMPOSED)
    if len(kinds) > 1:
        raise UserError(
            f"Bricks of the kinds {' and '.join(kinds)} cannot be merged: use one kind, or plug "
            "both (recipe=stitch/sum)."
        )
    if kinds:
        merging.check_together(section, low_rank=kinds == ["lora"])
    space = section["space"]
    needs = sidecars.needed_by(section["rule"])
    if needs is not None and space not in ("auto", "delta"):
        raise UserError(
            f"rule={section['rule']} goes by {needs} statistics of weights: use merge.space=delta."
        )
    if kinds and kinds[0] != "lora" and space not in ("auto", "parameters"):
        raise UserError(
            f"merge.space={space} is for low-rank updates, and bricks of kind {kinds[0]} have "
            "none: use merge.space=parameters."
        )


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Merges and stores; returns the record's own part."""
    from cfm_train.bricks.stored import store
    from cfm_train.configuration.apply import assemble, plain
    from cfm_train.evaluation.scorer import Body, identity_of
    from cfm_train.merging.engine import merge
    from cfm_train.merging.invariants import try_promises
    from cfm_train.merging.mix import make_mix
    from cfm_train.operations.found import report
    from cfm_train.operations.setting import (
        backbone_entries,
        brick_entry,
        open_backbone,
        scorer_for,
        tracked,
        unchanged,
    )
    from cfm_train.training.cost import peak_memory

    selection = inputs.selection
    # Merge arithmetic is done in float32 and cast once, so the backbone's dtype does not matter.
    backbone, before = open_backbone(selection.backbone, selection.section)
    opened = [assemble(tree, selection.library, backbone) for tree in selection.trees]
    bodies = [plain(brick, backbone) for brick in opened]
    section, weights = inputs.section, inputs.weights
    sources = [str(part) for part in selection.trees]
    statistics = None
    if inputs.statistic is not None:
        statistics = sidecars.read(inputs.sidecars, inputs.statistic)
    found, reported = None, None
    with tracked(config, folder) as wandb:
        if inputs.sought is not None:
            from cfm_train.operations.bench import Bench
            from cfm_train.operations.found import find

            bench = Bench(
                bodies,
                backbone,
                section,
                weights,
                sought=inputs.sought,
                labels=selection.labels,
                sources=sources,
                statistics=statistics,
                seed=config["seed"],
            )
            # All that decides a trial is in the hash that names the folder.
            found = find(bench, wandb, folder, goes_on=True)
            section, weights = found.section, found.weights
        mix = make_mix(section)
        tree = tree_of(selection, section, weights, new_heads=bool(inputs.refitted))
        result = merge(bodies, weights, mix, backbone, sources=sources, statistics=statistics)
        merged = result.brick
        parents = [
            {"name": card.name, "version": card.version} for card in selection.cards.values()
        ]
        recipes = {card.ref: card.recipe for card in selection.cards.values()}
        promises = try_promises(
            bodies, weights, mix, backbone, sources=sources, statistics=statistics
        )
        recipe = {**config, "backbone": selection.section, "parents": recipes}
        if found is not None:
            recipe["search"] = {**config["search"], **found.choice}
        if judged := {**(inputs.sought.tasks if inputs.sought else {}), **inputs.refitted}:
            said = found.note if found is not None else None
            body = Body(config["name"], merged, identity_of(tree, merged), "merged", tree, said)
            scorer = scorer_for(judged, backbone, selection.backbone, config)
            refit.refit(body, merged, list(inputs.refitted), scorer)
            reported = report(body, scorer, wandb, folder)
        card = store(
            merged,
            selection.library,
            backbone,
            name=config["name"],
            operation="merge",
            expression=str(tree),
            parents=parents,
            tokenizer=tokenizer_hash(selection.backbone.folder),
            recipe=recipe,
            data=_data(inputs),
            metrics={} if reported is None else reported.metrics,
            run=folder.name,
        )
        same = unchanged(backbone, before, selection.backbone)
        wandb.artifact(
            card.name,
            "brick",
            selection.library.folder(card),
            {"version": card.version, "expression": str(tree)},
        )
    print(f"{card.ref} = {tree}")
    if found is not None:
        print(found.line())
    if inputs.refitted:
        print(f"heads trained anew on the merge: {', '.join(inputs.refitted)}")
    if result.lost is not None:
        rank = merged.hyper["rank"]
        print(f"cut to rank {rank}: up to {result.lost:.1%} of a site's update (norm) left out")
        promises["update left out by the cut to a rank"] = {
            "value": result.lost,
            "tolerance": None,
            "passed": True,
        }
    shares: dict[str, float] = {}
    for ref, share in parts_of(tree, 1.0):
        shares[ref] = shares.get(ref, 0.0) + share
    weighted = [
        {**parent, "weight": shares[f"{parent['name']}@{parent['version']}"]} for parent in parents
    ]
    entries = backbone_entries(backbone, same)
    entries["checks"] |= promises
    return {
        "brick": brick_entry(card, selection.library, weighted),
        **entries,
        **(found.record() if found is not None else {}),
        **(reported.record() if reported is not None else {}),
        "cost": {
            "peak_memory_bytes": peak_memory(),
            "trainable_parameters": sum(p.numel() for p in merged.parameters()),
        },
        "wandb": wandb.as_record(),
    }


def _data(inputs: Inputs) -> list[dict[str, Any]]:
    """What the bricks saw, and what their merge's heads did."""
    entries = [entry for card in inputs.selection.cards.values() for entry in card.data]
    seen = {(entry["name"], entry["fingerprint"]) for entry in entries}
    trained = ((name, task.fingerprints["train"]) for name, task in inputs.refitted.items())
    return entries + [
        {"name": name, "fingerprint": fingerprint, "licence": None}
        for name, fingerprint in trained
        if (name, fingerprint) not in seen
    ]


def parts_of(tree: Expression, weight: float) -> Iterator[tuple[str, float]]:
    """The bricks of a configuration that is given a weight, and how much of it falls on each: λ
    times the weights, whose mean stands for weights over depth."""
    if isinstance(tree, BrickRef):
        yield str(tree), weight
        return
    params = dict(tree.params)
    given = params.get("weights")
    scale = params.get("scale", 1.0)
    shares = given if isinstance(given, tuple) else [1 / len(tree.args)] * len(tree.args)
    for part, share in zip(tree.args, shares, strict=True):
        mean = sum(share) / len(share) if isinstance(share, tuple) else share  # type: ignore[arg-type]
        yield from parts_of(part, weight * float(mean) * float(scale))  # type: ignore[arg-type]
