"""Let a language model say what it sees or hears, and score it against what people said.

check    bricks, backbone, encoders, rows and items, without torch; rows about the same items are
         one item with several references
run      features cached ─► greedy texts, and again with the items shuffled ─► CIDEr-D ─► record
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.data.rows import Row
from cfm_train.data.sources import fingerprint
from cfm_train.errors import UserError
from cfm_train.modality.finding import FoundEncoder
from cfm_train.modality.items import Reader, answer_of, hashes
from cfm_train.operations.eyes import encoders_of, open_bricks, open_senses, read_asked
from cfm_train.operations.selection import Selection, select
from cfm_train.tracking.wandb_setting import resolve_mode

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.modality.asking import Sense

#: Rows whose texts are written together.
ROWS = 16


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        selection: bricks and backbone.
        encoders: those of the modality bricks, by reference.
        rows: one row for each prompt with its items.
        references: what was said of each.
        reader: reads the items.
        fingerprints: content hashes for the config hash.
    """

    selection: Selection
    encoders: dict[str, FoundEncoder]
    rows: list[Row]
    references: list[list[str]]
    reader: Reader
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Finds bricks, encoders, rows and items, without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    resolve_mode(config["tracking"]["mode"])
    selection = select(config)
    encoders = encoders_of(selection, config["encoder"])
    rows, reader = read_asked(selection, encoders, {**config["data"], "limit": None})
    first: dict[tuple[str, ...], Row] = {}
    references: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        key = tuple(row["text"])
        first.setdefault(key, row)
        references.setdefault(key, []).append(answer_of(row))
    limit = config["data"]["limit"]  # of items, not of texts
    if len(list(first)[:limit]) < 2:
        raise UserError(
            "data.items: CIDEr weighs words by how few items they are said of, and there is one "
            "item: give two or more."
        )
    fingerprints = {f"encoder/{ref}": one.fingerprint for ref, one in encoders.items()}
    fingerprints |= {**selection.fingerprints, "data/items": fingerprint(rows)}
    return Inputs(
        selection,
        encoders,
        list(first.values())[:limit],
        list(references.values())[:limit],
        reader,
        fingerprints,
    )


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Writes and scores a text for every item; returns the record's own part."""
    import time

    import numpy as np

    from cfm_train.evaluation.cider import cider
    from cfm_train.evaluation.intervals import paired_interval
    from cfm_train.modality.encoding import control
    from cfm_train.operations.setting import backbone_entries, brick_entry, open_backbone, unchanged
    from cfm_train.training.cost import peak_memory

    selection, rows = inputs.selection, inputs.rows
    backbone, before = open_backbone(selection.backbone, selection.section)
    bricks, reading = open_bricks(selection, backbone)
    senses = open_senses(config, inputs.encoders, reading, rows, inputs.reader)
    arms = {"test": [hashes(row) for row in rows]}
    if (other := control(rows, config["seed"])) is not None:
        arms["shuffled"] = other
    started = time.perf_counter()
    with backbone.slots.plugged(bricks):
        said = {arm: write_rows(config, backbone, rows, held, senses) for arm, held in arms.items()}
    seconds = time.perf_counter() - started
    draws = {"bootstrap": config["evaluation"]["bootstrap"], "seed": config["seed"]}
    scores = {arm: cider(texts, inputs.references) for arm, texts in said.items()}
    nothing = np.zeros(len(rows))
    figures = {
        f"{arm}/cider": paired_interval(one, nothing, **draws) for arm, one in scores.items()
    }
    if other is not None:
        gain = paired_interval(scores["test"], scores["shuffled"], **draws)
        figures["gain over shuffled/cider"] = gain
    same = unchanged(backbone, before, selection.backbone)
    card = selection.cards[next(iter(inputs.encoders))]
    return {
        "brick": brick_entry(card, selection.library),
        **backbone_entries(backbone, same),
        "metrics": {name: figure.as_dict() for name, figure in figures.items()},
        "samples": _samples(inputs, said["test"]),
        "cost": {
            "samples_per_second": len(arms) * len(rows) / max(seconds, 1e-9),
            "peak_memory_bytes": peak_memory(),
        },
    }


def write_rows(
    config: Mapping[str, Any],
    backbone: Backbone,
    rows: Sequence[Row],
    held: Sequence[Sequence[str]],
    senses: Mapping[str, Sense],
) -> list[str]:
    """A greedy text for each row with the items given; rows of one length go together."""
    import sys

    from tqdm import tqdm

    from cfm_train.modality.asking import alike, asked_ids, features_of_rows
    from cfm_train.modality.writing import write_texts

    tokenizer, most = backbone.tokenizer, int(config["max_new_tokens"])
    prompts = asked_ids(
        rows,
        held,
        senses,
        tokenizer,
        room=most,
        limit=min(config["data"]["max_length"], tokenizer.model_max_length),
        what="max_new_tokens",
    )
    texts = [""] * len(rows)
    quiet = 1.0 if sys.stderr.isatty() else 30.0
    with tqdm(total=len(rows), desc="writing", file=sys.stderr, mininterval=quiet) as bar:
        for part in alike(prompts, ROWS):
            batch = features_of_rows([rows[i] for i in part], [held[i] for i in part], senses)
            written = write_texts(backbone, [prompts[i] for i in part], batch, most)
            for i, text in zip(part, written, strict=True):
                texts[i] = text
            bar.update(len(part))
    return texts


def _samples(inputs: Inputs, said: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "input": ", ".join(one[:80] for one in row["_items"]),
            "prediction": text,
            "reference": " | ".join(texts),
            "at": row["_at"],
        }
        for row, text, texts in list(zip(inputs.rows, said, inputs.references, strict=True))[:8]
    ]
