"""Put items into classes by how likely a language model finds each class's name after the item.

check    bricks, backbone, encoder, rows and items, without torch
run      features cached ─► scores of every class, and again with the items shuffled ─► record
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.data.rows import Row
from cfm_train.data.sources import fingerprint
from cfm_train.errors import UserError, nearest
from cfm_train.modality.finding import FoundEncoder
from cfm_train.modality.items import Reader, hashes, read_rows
from cfm_train.operations.align import open_cache, wanted
from cfm_train.operations.eyes import encoders_of, open_bricks
from cfm_train.operations.selection import Selection, select
from cfm_train.tracking.wandb_setting import resolve_mode

if TYPE_CHECKING:
    import numpy as np

    from cfm_train.backbone.load import Backbone
    from cfm_train.modality.cache import FeatureCache
    from cfm_train.modality.modality import Modality

#: Rows whose prompts are computed together, and most names behind prompts in one pass.
ROWS, NAMES = 32, 1024


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        selection: bricks and backbone.
        ref: the modality brick.
        encoder: its encoder.
        rows: the rows; each answer is one of the classes.
        reader: reads their items.
        classes: the names, in order.
        max_length: most tokens of a row, the name of a class included.
        fingerprints: content hashes for the config hash.
    """

    selection: Selection
    ref: str
    encoder: FoundEncoder
    rows: list[Row]
    reader: Reader
    classes: list[str]
    max_length: int
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Finds bricks, encoder, rows and items, without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    resolve_mode(config["tracking"]["mode"])
    selection = select(config)
    encoders = encoders_of(selection, config["encoder"])
    if len(encoders) != 1:
        raise UserError(
            f"classify needs one modality brick among bricks, and there are {len(encoders)}: train "
            "one with recipe=modality/align."
        )
    (ref, encoder), data = next(iter(encoders.items())), config["data"]
    prompt = data["prompt"]
    if prompt is None:
        prompt = selection.cards[ref].recipe.get("data", {}).get("prompt", "<item>")
    beside = Path(data["items"]).expanduser()
    reader = Reader(data["root"], beside if beside.is_dir() else beside.parent)
    rows = read_rows(data["items"], {**data, "prompt": prompt}, encoder.modality, reader)
    if any("turns" in row for row in rows):
        raise UserError(
            "data.items: rows to classify have an item and a class (data.text=COLUMN), no messages."
        )
    rows = rows[: data["limit"]]
    classes = list(data["classes"] or sorted({row["answer"] for row in rows}))
    if len(set(classes)) < 2 or len(set(classes)) < len(classes):
        raise UserError("data.classes must name two classes or more, each once.")
    for row in rows:
        if row["answer"] not in classes:
            raise UserError(
                f"{row['_at']}: '{row['answer']}' is none of data.classes."
                f"{nearest(row['answer'], classes)}"
            )
    return Inputs(
        selection,
        ref,
        encoder,
        rows,
        reader,
        classes,
        data["max_length"],
        selection.fingerprints | {"encoder": encoder.fingerprint, "data/items": fingerprint(rows)},
    )


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Scores every class of every row; returns the record's own part."""
    import time

    import numpy as np

    from cfm_train.evaluation.contributions import contributions
    from cfm_train.evaluation.examples import Examples
    from cfm_train.modality.encoding import shuffled
    from cfm_train.operations.setting import backbone_entries, brick_entry, open_backbone, unchanged
    from cfm_train.training.cost import peak_memory

    selection = inputs.selection
    backbone, before = open_backbone(selection.backbone, selection.section)
    bricks, reading = open_bricks(selection, backbone)
    brick = reading[inputs.ref]
    cache = open_cache(config, inputs.encoder)
    want = wanted(inputs.rows)
    if any(item not in cache.index for item in want):
        encoder = inputs.encoder.open().to(backbone.device)
        about, limit = inputs.encoder.describe(), config["cache"]["limit_gb"]
        cache.fill(encoder, want, inputs.reader.read, limit, about)
    right = np.array([inputs.classes.index(row["answer"]) for row in inputs.rows])
    figures: dict[str, Any] = {}
    started = time.perf_counter()
    samples: list[dict[str, Any]] = []
    arms = {"test": [hashes(row) for row in inputs.rows]}
    if len(inputs.rows) > 1:  # else there are no other row's items
        arms["shuffled"] = shuffled(inputs.rows, config["seed"])
    with backbone.slots.plugged(bricks):
        for arm, held in arms.items():
            scores = score_rows(inputs, backbone, brick, cache, held, config["score"])
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
    card = selection.cards[inputs.ref]
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
    inputs: Inputs,
    backbone: Backbone,
    brick: Modality,
    cache: FeatureCache,
    held: Sequence[Sequence[str]],
    score: str,
) -> np.ndarray:
    """Scores ``[rows, classes]`` with the items given; rows of one length go together."""
    import sys

    import numpy as np
    from tqdm import tqdm

    from cfm_train.modality.encoding import Placeholder, answer_ids, given, prompt_ids
    from cfm_train.modality.scoring import class_scores

    place = Placeholder(brick.modality, brick.sentinel, brick.count, cache.length)
    tokenizer, marker = backbone.tokenizer, f"<{brick.modality}>"
    prompts = [
        prompt_ids(row["prompt"], tokenizer, {marker: [place.tokens(item) for item in items]})
        for row, items in zip(inputs.rows, held, strict=True)
    ]
    classes = [answer_ids(inputs.rows[0]["prompt"], name, tokenizer) for name in inputs.classes]
    scores = np.zeros((len(prompts), len(classes)))
    longest = max(map(len, classes))
    limit = min(inputs.max_length, tokenizer.model_max_length)
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        if len(prompt) + longest > limit:
            raise UserError(
                f"{inputs.rows[i]['_at']}: its items, its prompt and a class take "
                f"{len(prompt) + longest} tokens, and {limit} are allowed (data.max_length, "
                "and what the backbone reads)."
            )
        groups.setdefault(len(prompt), []).append(i)
    together = min(ROWS, max(1, NAMES // len(classes)))
    quiet = 1.0 if sys.stderr.isatty() else 30.0
    with tqdm(total=len(prompts), desc="scoring", file=sys.stderr, mininterval=quiet) as bar:
        for members in groups.values():
            for start in range(0, len(members), together):
                part = members[start : start + together]
                batch = given(brick.modality, [[cache.read(x) for x in held[i]] for i in part])
                scores[part] = class_scores(
                    backbone, [prompts[i] for i in part], classes, batch, score
                )
                bar.update(len(part))
    return scores


def _samples(inputs: Inputs, said: np.ndarray) -> list[dict[str, Any]]:
    return [
        {
            "input": ", ".join(one[:80] for one in row["_items"]),
            "prediction": inputs.classes[int(answer)],
            "reference": row["answer"],
            "right": inputs.classes[int(answer)] == row["answer"],
            "at": row["_at"],
        }
        for row, answer in list(zip(inputs.rows, said, strict=True))[:8]
    ]
