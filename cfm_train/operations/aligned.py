"""What the stages of a modality brick share: training on cached features, judging, storing.

features cached ─► bricks started ─► fit on cached features ─► test, with the items shuffled, and
text without any ─► store, each brick by itself ─► record
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.backbone.fingerprint import tokenizer_hash
from cfm_train.operations import trained
from cfm_train.operations.align import Inputs, open_cache

if TYPE_CHECKING:
    import numpy as np

    from cfm_train.backbone.load import Backbone
    from cfm_train.bricks.brick import Brick
    from cfm_train.data.encode import TaskData
    from cfm_train.data.rows import Row
    from cfm_train.data.sources import Checked
    from cfm_train.library.card import Card
    from cfm_train.modality.cache import FeatureCache
    from cfm_train.modality.encoding import ItemRows, Placeholder

#: Most items, and about how many vectors, that mean and deviation are learned from: a map of places
#: for each of thousands of images would fill the memory.
ITEMS, VECTORS = 4096, 65536

#: Makes the bricks of a run by name, the modality brick first, from the backbone, the width of the
#: encoder's features and their cache.
Start = Callable[["Backbone", int, "FeatureCache"], "dict[str, Brick]"]


def train_on_items(
    config: dict[str, Any],
    inputs: Inputs,
    folder: Path,
    start: Start,
    *,
    section: Mapping[str, Any],
    parents: list[dict[str, str]],
) -> dict[str, Any]:
    """Trains, judges and stores the bricks of a stage; returns the record's own part.

    Args:
        config: of the run.
        inputs: what was checked.
        folder: the run folder.
        start: makes the bricks; they are trained as one, and stored each by itself.
        section: the ``backbone`` section.
        parents: what the modality brick was made from; those beside it were made from it.

    Raises:
        RuntimeError: training diverged; the message names step and rows.
    """
    from cfm_train.modality.encoding import Placeholder
    from cfm_train.modality.judging import bare_text, judge
    from cfm_train.modality.modality import Modality
    from cfm_train.operations.setting import open_backbone, tracked, unchanged
    from cfm_train.tracking.metrics_file import MetricsFile
    from cfm_train.training.checkpoint import read_position
    from cfm_train.training.fit import fit
    from cfm_train.training.module import Diverged
    from cfm_train.training.several import Several

    settings, checked = config["trainer"], inputs.checked
    backbone, before = open_backbone(inputs.backbone, section, settings)
    encoder = inputs.encoder.open().to(backbone.device)
    cache = open_cache(config, inputs.encoder)
    filled = cache.fill(
        encoder,
        inputs.wanted(),
        inputs.reader.read,
        config["cache"]["limit_gb"],
        inputs.encoder.describe(),
    )
    bricks = start(backbone, encoder.width, cache)
    del encoder  # training reads the cache alone
    eyes = next(iter(bricks.values()))
    assert isinstance(eyes, Modality)
    brick = eyes if len(bricks) == 1 else Several(bricks.values())
    placeholder = Placeholder(eyes.modality, eyes.sentinel, eyes.count, cache.length)
    task, other = encode_all(checked, backbone, placeholder, cache, config["seed"])
    tasks = {"items": task}
    print(trained.rows_line(checked, task), flush=True)
    bare = bare_text(backbone, checked)

    position = read_position(folder / "checkpoints")
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.cut_back(position.step)
    with tracked(config, folder) as wandb:
        try:
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
            )
        except Diverged as error:
            raise RuntimeError(trained.where(error, tasks)) from None
        judged = judge(config, backbone, brick, eyes, task, other, checked, bare)
        same = unchanged(backbone, before, inputs.backbone)
        cards = store_all(config, inputs, backbone, bricks, judged, parents, folder.name)
        record = record_of(inputs, cards[0], brick, backbone, fitted, judged, same)
        record["checks"]["features on disk"] = {
            "value": filled["bytes"] / 1e9,
            "tolerance": float(config["cache"]["limit_gb"]),
            "passed": filled["bytes"] <= config["cache"]["limit_gb"] * 1e9,
        }
        for card in cards:
            version = {"version": card.version}
            wandb.artifact(card.name, "brick", inputs.library.folder(card), version)
        wandb.summary({name: figure["value"] for name, figure in record["metrics"].items()})
    return {**record, "wandb": wandb.as_record()}


def store_all(
    config: dict[str, Any],
    inputs: Inputs,
    backbone: Backbone,
    bricks: Mapping[str, Brick],
    judged: Any,
    parents: list[dict[str, str]],
    run: str,
) -> list[Card]:
    """Puts the bricks into the library, each under its name; gives their cards in order."""
    from cfm_train.bricks.stored import store

    cards: list[Card] = []
    for name, brick in bricks.items():
        made_from = [{"name": card.name, "version": card.version} for card in cards[:1]]
        cards.append(
            store(
                brick,
                inputs.library,
                backbone,
                name=name,
                operation=config["operation"],
                parents=made_from or parents,
                tokenizer=tokenizer_hash(inputs.backbone.folder),
                recipe=config,
                data=[
                    {
                        "name": config["name"],
                        "fingerprint": inputs.checked.fingerprints["train"],
                        "licence": None,
                    }
                ],
                metrics=judged.figures,
                run=run,
            )
        )
    if len(cards) > 1:
        print(f"stored: bricks=[{','.join(card.name for card in cards)}]", flush=True)
    return cards


def some_vectors(cache: FeatureCache, items: list[str]) -> np.ndarray:
    """Feature vectors ``[vectors, d_v]`` to learn mean and deviation from, see `ITEMS`."""
    import numpy as np

    parts: list[np.ndarray] = []
    held = 0
    for item in items[:ITEMS]:
        if held >= VECTORS:
            break
        parts.append(cache.read(item))
        held += len(parts[-1])
    return np.concatenate(parts)


def encode_all(
    checked: Checked, backbone: Backbone, placeholder: Placeholder, cache: FeatureCache, seed: int
) -> tuple[TaskData, ItemRows | None]:
    """Every split as token numbers with placeholders, and the test rows with each other's items
    (None where they are about one item).

    Raises:
        UserError: see `encode_items`; said of the control too before anything is trained.
    """
    from cfm_train.data.encode import TaskData
    from cfm_train.modality.encoding import control, encode_items

    length = min(checked.section["max_length"], backbone.tokenizer.model_max_length)

    def encoded(rows: list[Row], held: list[list[str]] | None = None) -> ItemRows:
        return encode_items(rows, backbone.tokenizer, placeholder, cache.read, length, held)

    splits = {name: encoded(rows) for name, rows in checked.rows.items() if rows}
    test = checked.rows["test"]
    held = control(test, seed) if test else None
    other = None if held is None else encoded(test, held)
    task = TaskData(checked.spec, splits["train"], splits.get("validation"), splits.get("test"))
    return task, other


def record_of(
    inputs: Inputs,
    card: Any,
    brick: Brick,
    backbone: Backbone,
    fitted: Any,
    judged: Any,
    same: bool,
) -> dict[str, Any]:
    """The record's own part, without W&B."""
    from cfm_train.operations.setting import backbone_entries, brick_entry

    entries = backbone_entries(backbone, same)
    entries["checks"] |= judged.checks
    return {
        "brick": brick_entry(card, inputs.library),
        **entries,
        "metrics": judged.figures,
        "cost": fitted.cost(brick.parameter_count()),
        "data": trained.data_report({"items": inputs.checked}),
        "samples": judged.samples,
        "curves": "metrics.jsonl",
    }
