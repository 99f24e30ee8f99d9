"""Train a modality brick: a connector from a frozen encoder to a frozen language model.

check    backbone, encoder, every row and every item, all before torch is imported
run      connector built on cached features ─► trained, judged and stored (`aligned`) ─► record
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.backbone.fingerprint import fingerprint
from cfm_train.backbone.spec import ResolvedBackbone, resolve
from cfm_train.data.sources import Checked, data_fingerprints
from cfm_train.library.card import check_name
from cfm_train.library.store import Library
from cfm_train.modality.finding import FoundEncoder, find_encoder, looks
from cfm_train.modality.fitting import check_fit
from cfm_train.modality.items import Reader, check_items, hashes
from cfm_train.operations import trained
from cfm_train.tracking.wandb_setting import resolve_mode

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.bricks.brick import Brick
    from cfm_train.modality.cache import FeatureCache
    from cfm_train.modality.modality import Modality


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
    check_fit(config["connector"], config["encoder"], backbone.config)
    look = looks({"": encoder})
    checked, reader = check_items(config["data"], encoder.modality, config["name"], look)
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
    from cfm_train.operations.aligned import some_vectors, train_on_items

    def start(backbone: Backbone, width: int, cache: FeatureCache) -> dict[str, Brick]:
        import torch

        brick = new_brick(config, inputs.encoder, width, backbone)
        seen = sorted({item for row in inputs.checked.rows["train"] for item in hashes(row)})
        brick.standardise(torch.from_numpy(some_vectors(cache, seen)))
        return {config["name"]: brick}

    return train_on_items(config, inputs, folder, start, section=config["backbone"], parents=[])
