"""Teach a brick facts, each with parameters of its own, put a gate before them, and judge both.

check    backbone, encoder, every fact, the library, all before torch is imported
run      contexts ─► groups of facts taught ─► gate calibrated ─► judged ─► stored ─► record

Facts are taught in groups, and a group that is done lies in ``checkpoints``: a killed run goes on
after the last whole group, and comes to what it would have come to, for facts never meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.backbone.fingerprint import file_hash, fingerprint, tokenizer_hash
from cfm_train.backbone.spec import ResolvedBackbone, resolve
from cfm_train.config.signature import kinds
from cfm_train.data.facts import Fact
from cfm_train.data.facts import fingerprint as facts_fingerprint
from cfm_train.errors import UserError
from cfm_train.knowledge.stated import facts_of
from cfm_train.library.card import check_name
from cfm_train.library.store import Library
from cfm_train.tracking.wandb_setting import resolve_mode


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        backbone: the language model's folder.
        encoder: of the gate, and of kinds that are computed from vectors; None for neither.
        facts: the facts.
        unrelated: text that has nothing to do with them; empty for none.
        library: where the brick will go.
        fingerprints: content hashes for the config hash.
    """

    backbone: ResolvedBackbone
    encoder: ResolvedBackbone | None
    facts: list[Fact]
    unrelated: str
    library: Library
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Checks everything that teaching needs, without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_name(config["name"])
    resolve_mode(config["tracking"]["mode"])
    known = kinds("bricks", "ByFact")
    if config["brick"]["kind"] not in known:
        raise UserError(
            f"brick={config['brick']['kind']} has no parameters for each fact: use brick="
            f"{', '.join(known[:-1])} or {known[-1]}."
        )
    backbone = resolve(config["backbone"])
    facts = facts_of(config["data"])
    reads = config["brick"].get("told") == "vector"
    if reads and not facts[0].vector:
        raise UserError(
            f"brick.told=vector: {facts[0].at} has no column 'vector': add it, or set "
            "brick.told=answer."
        )
    if facts[0].vector and not reads:
        raise UserError(
            f"{facts[0].at}: the column 'vector' is read by brick=map brick.told=vector alone: set "
            "them, or take the column out."
        )
    encoder = None
    encodes = config["brick"]["kind"] in kinds("bricks", "ByVector") and not reads
    if encodes or config["gate"]["kind"] == "encoder":
        encoder = resolve(config["sentence_encoder"], "sentence_encoder")
    if config["gate"]["kind"] == "none" and config["gate"]["threshold"] is not None:
        raise UserError(
            f"gate.threshold={config['gate']['threshold']} is that of a gate, and gate.kind=none "
            "has none: leave one of them out."
        )
    unrelated = read_text(config["data"]["unrelated"])
    library = Library(config["library"])
    library.check_writable()
    fingerprints = {
        "backbone": fingerprint(backbone.folder),
        "data/facts": facts_fingerprint(facts),
    }
    if encoder is not None:
        fingerprints["encoder"] = fingerprint(encoder.folder)
    if config["data"]["unrelated"]:
        fingerprints["data/unrelated"] = file_hash(Path(config["data"]["unrelated"]).expanduser())
    return Inputs(backbone, encoder, facts, unrelated, library, fingerprints)


def read_text(path: str | None) -> str:
    """The text of ``data.unrelated``, empty where there is none.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    if path is None:
        return ""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.unrelated: {path} cannot be read as text ({error}): name a .txt file, or leave "
            "the key out."
        ) from None
    if not text.strip():
        raise UserError(f"data.unrelated: {path} is empty: name another file, or leave it out.")
    return text


def rehearse(config: dict[str, Any], inputs: Inputs) -> None:
    """Loads backbone and encoder and builds the brick, as ``dry_run`` wants to know.

    Raises:
        UserError: the brick does not fit the backbone, or the gate's encoder is none.
    """
    from cfm_train.bricks.fact_gate import Encoder
    from cfm_train.operations.setting import open_backbone
    from cfm_train.operations.taught import new_brick

    backbone, _ = open_backbone(inputs.backbone, config["backbone"], {"precision": "float32"})
    encoder = None if inputs.encoder is None else Encoder(config["sentence_encoder"])
    brick = new_brick(config, inputs.facts, backbone, encoder)
    print(_line(inputs, brick))


def _line(inputs: Inputs, brick: Any) -> str:
    facts = inputs.facts
    count = {
        "held-out prompts": sum(len(fact.held_out) for fact in facts),
        "prompts for something else": sum(len(fact.others) for fact in facts),
        "prompts about neighbours": sum(len(fact.neighbours) for fact in facts),
    }
    parts = [f"{sum(len(fact.prompts) for fact in facts)} prompts to learn"]
    parts += [f"{number} {what}" for what, number in count.items() if number]
    size = brick.parameter_count() // (1 if brick.shared else len(facts))
    whose = "parameters that all share" if brick.shared else "parameters for each fact"
    return f"{len(facts)} facts: {', '.join(parts)}; {size:,} {whose}"


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Teaches, calibrates, judges and stores; returns the record's own part.

    Raises:
        RuntimeError: teaching diverged; the message names the facts.
    """
    from tqdm import tqdm

    from cfm_train.bricks.fact_gate import Encoder
    from cfm_train.bricks.stored import store
    from cfm_train.knowledge.calibrating import calibrate
    from cfm_train.knowledge.fact_figures import ARMS, SETS, judge, passes
    from cfm_train.operations.setting import (
        backbone_entries,
        brick_entry,
        open_backbone,
        tracked,
        unchanged,
    )
    from cfm_train.operations.taught import (
        in_groups,
        new_brick,
        samples_of,
        share,
        single,
        sizes,
        unplugged,
        windows,
    )
    from cfm_train.tracking.metrics_file import MetricsFile
    from cfm_train.training.cost import peak_memory

    facts, settings = inputs.facts, config["teaching"]
    trainer = {"precision": "float32", "threads": settings["threads"]}
    backbone, before = open_backbone(inputs.backbone, config["backbone"], trainer)
    encoder = None if inputs.encoder is None else Encoder(config["sentence_encoder"])
    brick = new_brick(config, facts, backbone, encoder)
    print(_line(inputs, brick), flush=True)
    bare = unplugged(backbone, facts)
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.cut_back(-1)  # the groups on disk have their curves, and write them again
    with tracked(config, folder) as wandb:
        taught = in_groups(config, facts, backbone, brick, encoder, folder, metrics, wandb)
        figures: dict[str, Any] = {}
        if encoder is not None and config["gate"]["kind"] == "encoder":
            with tqdm(desc="gate: prompts encoded", unit="prompt", leave=False) as bar:
                calibrated = calibrate(
                    facts,
                    encoder,
                    false_fires=config["gate"]["false_fires"],
                    threshold=config["gate"]["threshold"],
                    tick=bar.update,
                )
            brick.gate = calibrated.gate
            bootstrap = {"bootstrap": config["evaluation"]["bootstrap"], "seed": config["seed"]}
            figures |= share("gate/hits on what is taught", calibrated.hits, **bootstrap)
            figures |= share("gate/false fires", calibrated.false_fires, **bootstrap)
        brick.eval().requires_grad_(False)
        unrelated = windows(backbone, inputs.unrelated, config["evaluation"])
        total = passes(facts, unrelated)
        with tqdm(total=total, desc="judged", unit="prompt", leave=False) as bar:
            judged, samples = judge(
                backbone,
                brick,
                facts,
                unrelated=unrelated,
                bootstrap=config["evaluation"]["bootstrap"],
                seed=config["seed"],
                tick=bar.update,
            )
        figures = {**judged, **figures, **taught["figures"]}
        same = unchanged(backbone, before, inputs.backbone)
        exact = bare == unplugged(backbone, facts)
        figures |= sizes(brick)
        figures["seconds_per_fact"] = single(taught["seconds"] / len(facts), len(facts))
        told = {"name": "facts", "fingerprint": inputs.fingerprints["data/facts"], "licence": None}
        card = store(
            brick,
            inputs.library,
            backbone,
            name=config["name"],
            tokenizer=tokenizer_hash(inputs.backbone.folder),
            operation="teach",
            recipe=config,
            data=[told],
            metrics=figures,
            run=folder.name,
        )
        wandb.artifact(card.name, "brick", inputs.library.folder(card), {"version": card.version})
        wandb.summary({name: figure["value"] for name, figure in figures.items()})
        rows = [
            [name, *(figures[f"{name}/{arm}/says_answer"]["value"] for arm in ARMS)]
            for name in SETS
            if f"{name}/brick/says_answer" in figures
        ]
        wandb.table("answers", ["prompts", *ARMS], rows)
    entries = backbone_entries(backbone, same)
    entries["checks"]["unplugged equals bare"] = {
        "value": exact,
        "tolerance": None,
        "passed": exact,
    }
    return {
        "brick": brick_entry(card, inputs.library),
        **entries,
        "metrics": figures,
        "cost": {
            "train_seconds": taught["seconds"],
            "tokens_per_second": taught["tokens"] / max(taught["seconds"], 1e-9),
            "peak_memory_bytes": peak_memory(),
            "trainable_parameters": sum(p.numel() for p in brick.parameters()),
        },
        "data": {
            "leaks": {},
            "skipped_rows": 0,
            "fingerprints": {
                name.removeprefix("data/"): value
                for name, value in inputs.fingerprints.items()
                if name.startswith("data/")
            },
        },
        "samples": samples_of(samples),
        "curves": "metrics.jsonl",
        "wandb": wandb.as_record(),
    }
