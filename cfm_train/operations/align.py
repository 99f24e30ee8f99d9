"""Train a modality brick: a connector from a frozen encoder to a frozen language model.

check    backbone, encoder, every row and every item, all before torch is imported
run      features cached ─► connector built ─► fit on cached features ─► test, with the items
         shuffled and without any ─► store ─► record
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.backbone.fingerprint import fingerprint, tokenizer_hash
from cfm_train.backbone.spec import ResolvedBackbone, resolve
from cfm_train.data.rows import Row
from cfm_train.data.sources import Checked, data_fingerprints
from cfm_train.library.card import check_name
from cfm_train.library.store import Library
from cfm_train.modality.finding import FoundEncoder, find_encoder
from cfm_train.modality.fitting import check_fit
from cfm_train.modality.items import Reader, check_items, hashes
from cfm_train.operations import trained
from cfm_train.tracking.wandb_setting import resolve_mode

if TYPE_CHECKING:
    import numpy as np

    from cfm_train.backbone.load import Backbone
    from cfm_train.data.encode import TaskData
    from cfm_train.modality.cache import FeatureCache
    from cfm_train.modality.encoding import ItemRows, Placeholder
    from cfm_train.modality.modality import Modality


#: Most items, and about how many vectors, that mean and deviation are learned from: a map of places
#: for each of thousands of images would fill the memory.
ITEMS, VECTORS = 4096, 65536


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        backbone: the language model's folder and config.
        encoder: the encoder's.
        checked: the rows.
        reader: reads their items.
        library: where the brick will go.
        fingerprints: content hashes for the config hash.
    """

    backbone: ResolvedBackbone
    encoder: FoundEncoder
    checked: Checked
    reader: Reader
    library: Library
    fingerprints: dict[str, str]

    def wanted(self) -> dict[str, tuple[str, str]]:
        """Every item by its hash: its reference, and where it is named."""
        return wanted(row for rows in self.checked.rows.values() for row in rows)


def wanted(rows: Any) -> dict[str, tuple[str, str]]:
    """The items of rows by hash: reference, and where it is named."""
    return {
        item: (reference, row["_at"])
        for row in rows
        for item, reference in zip(hashes(row), row["_items"], strict=True)
    }


def check(config: dict[str, Any]) -> Inputs:
    """Checks everything that the run needs, without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_name(config["name"])
    resolve_mode(config["tracking"]["mode"])
    backbone = resolve(config["backbone"])
    encoder = find_encoder(config["encoder"])
    check_fit(config["connector"], config["encoder"])
    checked, reader = check_items(config["data"], encoder.modality, config["name"])
    library = Library(config["library"])
    library.check_writable()
    fingerprints = {
        "backbone": fingerprint(backbone.folder),
        "encoder": encoder.fingerprint,
        **data_fingerprints({"items": checked}),
    }
    return Inputs(backbone, encoder, checked, reader, library, fingerprints)


def rehearse(config: dict[str, Any], inputs: Inputs) -> None:
    """Builds the connector for the backbone, and forecasts the cache, as ``dry_run`` wants.

    Raises:
        UserError: they do not fit, or the features would take too much.
    """
    from cfm_train.operations.setting import open_backbone

    print(trained.rows_line(inputs.checked))
    backbone, _ = open_backbone(inputs.backbone, config["backbone"], config["trainer"])
    encoder = inputs.encoder.open()
    cache = open_cache(config, inputs.encoder)
    want = inputs.wanted()
    missing = [item for item in want if item not in cache.index]
    if missing:
        size = cache.forecast(encoder, missing, want, inputs.reader.read)
        print(f"features: {len(missing):,} items to encode, {size / 1e6:.1f} MB")
    new_brick(config, inputs.encoder, encoder.width, backbone)


def open_cache(config: dict[str, Any], encoder: FoundEncoder) -> FeatureCache:
    """The cache of an encoder's features."""
    from cfm_train.modality.cache import FeatureCache
    from cfm_train.paths import cache_dir

    return FeatureCache(cache_dir(), encoder.fingerprint, config["cache"]["dtype"])


def new_brick(
    config: dict[str, Any], encoder: FoundEncoder, width: int, backbone: Backbone
) -> Modality:
    """A new modality brick; asserts that what it trains is what the stage says.

    Raises:
        UserError: it does not fit the backbone.
    """
    from cfm_train.modality.modality import Modality
    from cfm_train.modality.stages import assert_trainable
    from cfm_train.training.seeding import reseed

    reseed(config["seed"], "brick")
    connector = {k: v for k, v in config["connector"].items() if k != "learning_rate"}
    about = encoder.describe() | {"width": width}
    brick = Modality(encoder.modality, about, connector, config["tags"]).build(backbone)
    assert_trainable("align", {"brick": brick, "backbone": backbone})
    return brick


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Trains, judges and stores; returns the record's own part.

    Raises:
        RuntimeError: training diverged; the message names step and rows.
    """
    import torch

    from cfm_train.bricks.stored import store
    from cfm_train.modality.encoding import Placeholder
    from cfm_train.modality.judging import bare_text, judge
    from cfm_train.operations.setting import open_backbone, tracked, unchanged
    from cfm_train.tracking.metrics_file import MetricsFile
    from cfm_train.training.checkpoint import read_position
    from cfm_train.training.fit import fit
    from cfm_train.training.module import Diverged

    settings, checked = config["trainer"], inputs.checked
    backbone, before = open_backbone(inputs.backbone, config["backbone"], settings)
    encoder = inputs.encoder.open().to(backbone.device)
    cache = open_cache(config, inputs.encoder)
    filled = cache.fill(
        encoder,
        inputs.wanted(),
        inputs.reader.read,
        config["cache"]["limit_gb"],
        inputs.encoder.describe(),
    )
    brick = new_brick(config, inputs.encoder, encoder.width, backbone)
    del encoder  # training reads the cache alone
    seen = sorted({item for row in checked.rows["train"] for item in hashes(row)})
    brick.standardise(torch.from_numpy(some_vectors(cache, seen)))
    placeholder = Placeholder(brick.modality, brick.sentinel, brick.count, cache.length)
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
        judged = judge(config, backbone, brick, task, other, checked, bare)
        same = unchanged(backbone, before, inputs.backbone)
        card = store(
            brick,
            inputs.library,
            backbone,
            name=config["name"],
            operation="align",
            tokenizer=tokenizer_hash(inputs.backbone.folder),
            recipe=config,
            data=[
                {
                    "name": config["name"],
                    "fingerprint": checked.fingerprints["train"],
                    "licence": None,
                }
            ],
            metrics=judged.figures,
            run=folder.name,
        )
        record = record_of(inputs, card, brick, backbone, fitted, judged, same)
        record["checks"]["features on disk"] = {
            "value": filled["bytes"] / 1e9,
            "tolerance": float(config["cache"]["limit_gb"]),
            "passed": filled["bytes"] <= config["cache"]["limit_gb"] * 1e9,
        }
        wandb.artifact(card.name, "brick", inputs.library.folder(card), {"version": card.version})
        wandb.summary({name: figure["value"] for name, figure in record["metrics"].items()})
    return {**record, "wandb": wandb.as_record()}


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
    """Every split as token numbers with placeholders, and the test rows with each other's items.

    Raises:
        UserError: see `encode_items`; said of the control too before anything is trained.
    """
    from cfm_train.data.encode import TaskData
    from cfm_train.modality.encoding import encode_items, shuffled

    length = min(checked.section["max_length"], backbone.tokenizer.model_max_length)

    def encoded(rows: list[Row], held: list[list[str]] | None = None) -> ItemRows:
        return encode_items(rows, backbone.tokenizer, placeholder, cache.read, length, held)

    splits = {name: encoded(rows) for name, rows in checked.rows.items() if rows}
    test = checked.rows["test"]
    other = encoded(test, shuffled(test, seed)) if len(test) > 1 else None
    task = TaskData(checked.spec, splits["train"], splits.get("validation"), splits.get("test"))
    return task, other


def record_of(
    inputs: Inputs,
    card: Any,
    brick: Modality,
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
