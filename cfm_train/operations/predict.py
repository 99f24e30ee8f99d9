"""Answer the rows of a file with a brick: one answer for each, in the file's order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.data.answers import check_suffix
from cfm_train.data.rows import Row
from cfm_train.data.sources import fingerprint, read_inputs
from cfm_train.data.tasks import GENERATIVE, TaskSpec, make_spec
from cfm_train.errors import UserError, nearest
from cfm_train.operations.selection import Selection, own_sections, select
from cfm_train.tracking.wandb_setting import resolve_mode

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.bricks.brick import Brick
    from cfm_train.data.encode import Encoded


#: A finished run is run again: its answers lie outside of the run folder and may be gone.
AGAIN = True


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        selection: brick and backbone.
        task: name of the head that answers.
        section: the data section it was trained with, with this run's columns.
        rows: the rows to answer.
        out: the file to write.
        fingerprints: content hashes for the config hash.
    """

    selection: Selection
    task: str
    section: dict[str, Any]
    rows: list[Row]
    out: Path
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Finds the brick, its task and the rows, without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    resolve_mode(config["tracking"]["mode"])
    out = Path(config["out"]).expanduser()
    check_suffix(out)
    selection = select(config)
    if len(selection.trees) > 1:
        raise UserError("predict answers with one brick: name one, or merge them first.")
    sections = own_sections(list(selection.cards.values()))
    task = config["data"]["task"] or (next(iter(sections)) if len(sections) == 1 else None)
    if task not in sections:
        what = "the brick answers several tasks" if task is None else f"no task '{task}'"
        raise UserError(f"data.task: {what}.{nearest(str(task), sections)}")
    section = dict(sections[task])
    heads = {name for card in selection.cards.values() for name in card.heads}
    if section["task"] not in GENERATIVE and task not in heads:
        raise UserError(
            f"{config['bricks'][0]} has no head for '{task}', so it cannot answer: train one here; "
            "adapters from elsewhere come without."
        )
    if config["data"]["text"] is not None:
        section["text"] = config["data"]["text"]
    rows = read_inputs(config["data"]["input"], section)
    if not out.parent.is_dir():
        raise UserError(f"out: there is no folder {out.parent}; make it, or write elsewhere.")
    if out.exists() and out.samefile(Path(config["data"]["input"]).expanduser()):
        raise UserError("out: this is the input file; write the answers elsewhere.")
    fingerprints = selection.fingerprints | {"data/input": fingerprint(rows)}
    return Inputs(selection, str(task), section, rows, out, fingerprints)


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Predicts and writes; returns the record's own part."""
    import time

    from cfm_train.configuration.apply import assemble
    from cfm_train.data.answers import encoded as encoded_answers
    from cfm_train.data.encode import encode_rows
    from cfm_train.operations.setting import backbone_entries, brick_entry, open_backbone, unchanged
    from cfm_train.paths import cache_dir
    from cfm_train.tracking.atomic import replace_file
    from cfm_train.training.cost import peak_memory

    selection = inputs.selection
    backbone, before = open_backbone(selection.backbone, selection.section)
    brick = assemble(selection.trees[0], selection.library, backbone)
    described = brick.describe_heads().get(inputs.task, {})
    labels = described.get("labels")
    spec = make_spec(inputs.section, None if labels is None else tuple(labels))
    encoded = encode_rows(
        inputs.rows,
        spec,
        inputs.section,
        backbone.tokenizer,
        cache_dir(),
    )
    started = time.perf_counter()
    with backbone.slots.plugged([brick]):
        answers = list(_answers(backbone, brick, spec, encoded, len(inputs.rows)))
    seconds = time.perf_counter() - started
    replace_file(inputs.out, encoded_answers(answers, inputs.out))
    same = unchanged(backbone, before, selection.backbone)
    card = selection.card_of(selection.trees[0])
    print(f"{len(answers)} answers: {inputs.out}")
    return {
        "brick": None if card is None else brick_entry(card, selection.library),
        **backbone_entries(backbone, same),
        "cost": {
            "samples_per_second": len(answers) / max(seconds, 1e-9),
            "peak_memory_bytes": peak_memory(),
        },
    }


def _answers(
    backbone: Backbone, brick: Brick, spec: TaskSpec, encoded: Encoded, count: int
) -> Iterator[dict[str, Any]]:
    """The answer of each row, in order."""
    from cfm_train.evaluation.generation import answer_texts
    from cfm_train.evaluation.probabilities import head_answers

    if spec.type in GENERATIVE:
        for said, _ in answer_texts(backbone, spec, encoded, range(count)):
            yield {"prediction": said}
    else:
        yield from head_answers(backbone, brick, spec, encoded)
