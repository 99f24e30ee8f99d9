"""Teach a brick what documents say, ask about them in three arms, and put it into the library.

check    backbone, documents, questions, distractors, library, all before torch is imported
run      load ─► read ─► build ─► fit (or encode) ─► ask ─► store ─► record
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.backbone.fingerprint import fingerprint, tokenizer_hash
from cfm_train.backbone.spec import ResolvedBackbone, resolve
from cfm_train.errors import UserError
from cfm_train.knowledge.documents import Documents, read
from cfm_train.library.card import Card, check_name
from cfm_train.library.store import Library
from cfm_train.operations import lessons, studied, trained
from cfm_train.tracking.wandb_setting import resolve_mode

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.bricks.brick import Brick
    from cfm_train.data.encode import TaskData
    from cfm_train.knowledge.objectives.objective import Learning
    from cfm_train.knowledge.tokens import Reader


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        backbone: the backbone's folder and config.
        documents: the documents and their questions.
        distractors: cards of the other bricks.
        library: where the brick will go.
        fingerprints: content hashes for the config hash.
    """

    backbone: ResolvedBackbone
    documents: Documents
    distractors: list[Card]
    library: Library
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Checks everything that can be checked without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_name(config["name"])
    resolve_mode(config["tracking"]["mode"])
    trained.check_kind(config["brick"]["kind"])
    lessons.check_objective(config)
    backbone = resolve(config["backbone"])
    lessons.check_lengths(config, backbone, config["brick"].get("tokens") or 0)
    library = Library(config["library"])
    library.check_writable()
    own = fingerprint(backbone.folder)
    distractors = lessons.distractors(config, library, own, backbone.id)
    documents = read(config["data"])
    fingerprints = {"backbone": own} | documents.fingerprints
    fingerprints |= {f"brick/{card.ref}": card.version for card in distractors}
    return Inputs(backbone, documents, distractors, library, fingerprints)


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Trains, asks and stores; returns the record's own part.

    Raises:
        RuntimeError: training diverged; the message names step and rows.
    """
    import torch

    from cfm_train.bricks.stored import store
    from cfm_train.data.encode import TaskData
    from cfm_train.evaluation.judge import probe
    from cfm_train.operations.setting import open_backbone, tracked, unchanged
    from cfm_train.tracking.metrics_file import MetricsFile
    from cfm_train.training.checkpoint import read_position
    from cfm_train.training.derive import derive
    from cfm_train.training.fit import fit
    from cfm_train.training.module import Diverged
    from cfm_train.training.objectives import BESIDE
    from cfm_train.training.samples import SampleOutputs

    settings = config["trainer"]
    print(inputs.documents.line(), flush=True)
    backbone, before = open_backbone(inputs.backbone, config["backbone"], settings)
    reader, brick, others = _begin(config, inputs, backbone)
    learning, task = _learning(config, inputs, reader, others)
    tasks = {config["name"]: task}
    bare = probe(backbone, tasks)
    position = read_position(folder / "checkpoints")
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.cut_back(position.step)
    with tracked(config, folder) as wandb:
        samples = SampleOutputs(backbone, tasks, settings["samples"], wandb)
        try:
            if learning is not None:
                fitted = fit(
                    backbone,
                    brick,
                    tasks,
                    settings,
                    seed=config["seed"],
                    mixture=1.0,
                    folder=folder,
                    position=position,
                    metrics=metrics,
                    wandb=wandb,
                    callbacks=[samples] if settings["samples"] else [],
                    learning=learning,
                )
            else:
                fitted = derive(backbone, brick, tasks, config["seed"], metrics, wandb)
        except Diverged as error:
            if learning is not None and learning.beside is not None:
                tasks[BESIDE] = TaskData(task.spec, learning.beside, None, None)
            raise RuntimeError(trained.where(error, tasks)) from None
        unrelated = inputs.documents.unrelated["test"]
        elsewhere = reader.blocks(unrelated, []) if unrelated else None
        judged = studied.judge(config, backbone, reader, brick, others, elsewhere)
        same = unchanged(backbone, before, inputs.backbone)
        back = torch.equal(bare, probe(backbone, tasks))
        card = store(
            brick,
            inputs.library,
            backbone,
            name=config["name"],
            operation="study",
            tokenizer=tokenizer_hash(inputs.backbone.folder),
            recipe=config,
            data=[
                {"name": name, "fingerprint": print_, "licence": None}
                for name, print_ in inputs.documents.fingerprints.items()
            ],
            metrics=judged.figures,
            run=folder.name,
        )
        record = studied.record_of(
            config, inputs.library, card, brick, backbone, fitted, judged, same=same, back=back
        )
        record["data"] = studied.data_report(inputs.documents)
        record["samples"] = samples.latest
        for name, table in studied.tables(record["arms"]).items():
            wandb.table(name, *table)
        wandb.artifact(card.name, "brick", inputs.library.folder(card), {"version": card.version})
        wandb.summary({name: figure["value"] for name, figure in record["metrics"].items()})
    return {**record, "wandb": wandb.as_record()}


def _begin(
    config: Mapping[str, Any], inputs: Inputs, backbone: Backbone
) -> tuple[Reader, Brick, list[Brick]]:
    """What tokenises the documents, the new brick, and its distractors.

    Raises:
        UserError: the backbone does not continue text, or the brick does not fit it or the others.
    """
    import torch

    from cfm_train.bricks.kinds import make_brick
    from cfm_train.bricks.prefix import room
    from cfm_train.bricks.stored import open_brick
    from cfm_train.knowledge.tokens import Reader
    from cfm_train.training.seeding import reseed

    if backbone.family != "decoder":
        raise UserError(
            f"The backbone '{backbone.id}' is an {backbone.family}, and documents are taught to a "
            "language model that reads from left to right: choose another backbone.path."
        )
    data = config["data"]
    reader = Reader(inputs.documents, backbone.tokenizer, data["max_length"], data["context"])
    reseed(config["seed"], "brick")
    text = torch.tensor(reader.whole())
    brick = make_brick(config["brick"]).about(text).build(backbone)
    others = [open_brick(card, inputs.library, backbone) for card in inputs.distractors]
    # How long a whole document is, only its tokens tell.
    alone = room([brick])
    lessons.check_lengths(config, inputs.backbone, alone, room([brick, *others]) - alone)
    with backbone.slots.plugged([*others, brick]):  # what cannot stand together is refused here
        pass
    return reader, brick, others


def _learning(
    config: Mapping[str, Any], inputs: Inputs, reader: Reader, others: list[Brick]
) -> tuple[Learning | None, TaskData]:
    """The objective at work (None where nothing is trained), and its rows as a task."""
    from cfm_train.data.encode import TaskData
    from cfm_train.data.tasks import TaskSpec
    from cfm_train.knowledge.distractors import Distractors
    from cfm_train.knowledge.objectives.objective import Learning, make_objective

    spec = TaskSpec(config["name"], "causal", None, "loss", False, ("text",))
    if config["objective"] is None:
        return None, TaskData(spec, reader.blocks(inputs.documents.rows, []), None, None)
    objective = make_objective(config["objective"]).read(reader)
    beside = reader.blocks(inputs.documents.unrelated["train"], []) if objective.keep else None
    learning = Learning(objective, beside, Distractors(others))
    return learning, TaskData(spec, objective.train_rows(), objective.validation_rows(), None)


def rehearse(config: dict[str, Any], inputs: Inputs) -> None:
    """Loads the backbone and builds the brick for it, as ``dry_run`` wants to know.

    Raises:
        UserError: the brick does not fit the backbone, or the documents are too short for it.
    """
    from cfm_train.operations.setting import open_backbone

    print(inputs.documents.line())
    backbone, _ = open_backbone(inputs.backbone, config["backbone"], config["trainer"])
    _begin(config, inputs, backbone)
