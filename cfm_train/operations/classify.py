"""Put items into classes by how likely a language model finds each class's name after the item.

check    bricks, backbone, encoders, rows and items, without torch
run      features cached ─► scores of every class, and again with the items shuffled ─► record
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.data.rows import Row
from cfm_train.data.sources import fingerprint
from cfm_train.errors import UserError, nearest
from cfm_train.modality.finding import FoundEncoder
from cfm_train.modality.items import Reader, answer_of, hashes
from cfm_train.operations.eyes import encoders_of, open_bricks, open_senses, read_asked
from cfm_train.operations.selection import Selection, select
from cfm_train.tracking.wandb_setting import resolve_mode

if TYPE_CHECKING:
    import numpy as np

    from cfm_train.backbone.load import Backbone
    from cfm_train.modality.asking import Sense

#: Rows whose prompts are computed together, and most names behind prompts in one pass.
ROWS, NAMES = 32, 1024


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        selection: bricks and backbone.
        encoders: those of the modality bricks, by reference.
        rows: the rows; each last answer is one of the classes.
        reader: reads their items.
        right: the class of each row.
        classes: the names, in order.
        fingerprints: content hashes for the config hash.
    """

    selection: Selection
    encoders: dict[str, FoundEncoder]
    rows: list[Row]
    reader: Reader
    right: list[str]
    classes: list[str]
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Finds bricks, encoders, rows and items, without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    resolve_mode(config["tracking"]["mode"])
    selection = select(config)
    encoders = encoders_of(selection, config["encoder"])
    rows, reader = read_asked(selection, encoders, config["data"])
    right = [answer_of(row) for row in rows]
    if len({"turns" in row for row in rows}) > 1:
        raise UserError("data.items: either all rows to classify have messages, or none has.")
    classes = list(config["data"]["classes"] or sorted(set(right)))
    if len(set(classes)) < 2 or len(set(classes)) < len(classes):
        raise UserError("data.classes must name two classes or more, each once.")
    for row, answer in zip(rows, right, strict=True):
        if answer not in classes:
            raise UserError(
                f"{row['_at']}: '{answer}' is none of data.classes.{nearest(answer, classes)}"
            )
    fingerprints = {f"encoder/{ref}": one.fingerprint for ref, one in encoders.items()}
    fingerprints |= {**selection.fingerprints, "data/items": fingerprint(rows)}
    return Inputs(selection, encoders, rows, reader, right, classes, fingerprints)


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Scores every class of every row; returns the record's own part."""
    import time

    import numpy as np

    from cfm_train.evaluation.contributions import contributions
    from cfm_train.evaluation.examples import Examples
    from cfm_train.modality.encoding import control
    from cfm_train.operations.setting import backbone_entries, brick_entry, open_backbone, unchanged
    from cfm_train.training.cost import peak_memory

    selection = inputs.selection
    backbone, before = open_backbone(selection.backbone, selection.section)
    bricks, reading = open_bricks(selection, backbone)
    senses = open_senses(config, inputs.encoders, reading, inputs.rows, inputs.reader)
    right = np.array([inputs.classes.index(answer) for answer in inputs.right])
    figures: dict[str, Any] = {}
    started = time.perf_counter()
    samples: list[dict[str, Any]] = []
    arms = {"test": [hashes(row) for row in inputs.rows]}
    if (other := control(inputs.rows, config["seed"])) is not None:
        arms["shuffled"] = other
    with backbone.slots.plugged(bricks):
        for arm, held in arms.items():
            scores = score_rows(config, inputs, backbone, senses, held)
            said = scores.argmax(axis=1)
            parts = contributions("classification", said, right, labels=tuple(inputs.classes))
            found = Examples({"classification": parts}, tuple(inputs.classes)).scores(
                bootstrap=config["evaluation"]["bootstrap"], seed=config["seed"]
            )
            figures |= {f"{arm}/{name}": one.as_dict() for name, one in found.items()}
            if arm == "test":
                samples = _samples(inputs, said)
    seconds = time.perf_counter() - started
    same = unchanged(backbone, before, selection.backbone)
    card = selection.cards[next(iter(inputs.encoders))]
    return {
        "brick": brick_entry(card, selection.library),
        **backbone_entries(backbone, same),
        "metrics": figures,
        "samples": samples,
        "cost": {
            "samples_per_second": len(arms) * len(inputs.rows) / max(seconds, 1e-9),
            "peak_memory_bytes": peak_memory(),
        },
    }


def score_rows(
    config: Mapping[str, Any],
    inputs: Inputs,
    backbone: Backbone,
    senses: Mapping[str, Sense],
    held: Sequence[Sequence[str]],
) -> np.ndarray:
    """Scores ``[rows, classes]`` with the items given; rows of one length go together."""
    import sys

    import numpy as np
    from tqdm import tqdm

    from cfm_train.modality.asking import alike, asked_ids, features_of_rows, said_ids
    from cfm_train.modality.scoring import class_scores

    rows, tokenizer = inputs.rows, backbone.tokenizer
    classes = [said_ids(rows[0], name, senses, tokenizer) for name in inputs.classes]
    prompts = asked_ids(
        rows,
        held,
        senses,
        tokenizer,
        room=max(map(len, classes)),
        limit=min(config["data"]["max_length"], tokenizer.model_max_length),
        what="a class",
    )
    scores = np.zeros((len(prompts), len(classes)))
    together = min(ROWS, max(1, NAMES // len(classes)))
    quiet = 1.0 if sys.stderr.isatty() else 30.0
    with tqdm(total=len(prompts), desc="scoring", file=sys.stderr, mininterval=quiet) as bar:
        for part in alike(prompts, together):
            batch = features_of_rows([rows[i] for i in part], [held[i] for i in part], senses)
            asked = [prompts[i] for i in part]
            scores[part] = class_scores(backbone, asked, classes, batch, config["score"])
            bar.update(len(part))
    return scores


def _samples(inputs: Inputs, said: np.ndarray) -> list[dict[str, Any]]:
    return [
        {
            "input": ", ".join(one[:80] for one in row["_items"]),
            "prediction": inputs.classes[int(answer)],
            "reference": right,
            "right": inputs.classes[int(answer)] == right,
            "at": row["_at"],
        }
        for row, right, answer in list(zip(inputs.rows, inputs.right, said, strict=True))[:8]
    ]
