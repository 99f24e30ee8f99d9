"""A connector's training step: on cached features, as a bare loop, and with its encoder.

    python -m benchmarks.modality_step --shared FOLDER --out FOLDER [--backbone FOLDER]

Three arms train the same connector from the same start on the same batches of CIFAR-10 images:

    alone     a plain loop in PyTorch: features in memory, connector, language model, AdamW
    cached    the project's trainer, the features mapped from their cache (float16, the default)
    encoder   the project's trainer, MobileNetV2-100 run on the images of each batch

They take turns, and each ratio is of one turn's medians; the median over the turns is told, and the
lowest and the highest. Targets: cached at most 1.1 of alone; the losses of all arms equal, with the
cache in float32 to rounding and in float16 to its precision. JPEG images need Pillow.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.carried import brick_lm
from benchmarks.modality import rows_of
from cfm_train.config.compose import compose
from cfm_train.data.batches import BatchStream
from cfm_train.data.encode import TaskData
from cfm_train.data.tasks import IGNORED
from cfm_train.modality.cache import FeatureCache, features_of
from cfm_train.modality.encoding import ItemRows, Placeholder, given
from cfm_train.modality.items import hashes
from cfm_train.operations import align, aligned
from cfm_train.operations.setting import open_backbone, tracked
from cfm_train.paths import cache_dir
from cfm_train.tracking.metrics_file import MetricsFile
from cfm_train.training.checkpoint import Position
from cfm_train.training.dataset import StepDataset
from cfm_train.training.fit import fit
from cfm_train.training.schedule import factor


@dataclass(frozen=True)
class Turn:
    """What one arm did in one turn: seconds and loss of each step."""

    seconds: list[float]
    losses: list[float]


@dataclass
class Live(ItemRows):
    """Rows whose items go through the encoder whenever a batch is made."""

    encode: Callable[[list[str]], list[np.ndarray]]

    def extras(self, indices: Any) -> dict[str, Any]:
        """The features of these rows' items, computed now in one batch."""
        rows = [self.held[int(i)] for i in indices]
        found = iter(self.encode([item for row in rows for item in row]))
        return given(self.modality, [[next(found) for _ in row] for row in rows])


class Bench:
    """The three arms over one backbone, encoder and set of rows.

    Args:
        config: of ``recipe=modality/align``.
        folder: for what training writes.
    """

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        self.config, self.folder = config, folder
        self.inputs = inputs = align.check(config)
        self.backbone, _ = open_backbone(inputs.backbone, config["backbone"], config["trainer"])
        self.encoder = inputs.encoder.open().to(self.backbone.device)
        self.want = inputs.wanted()
        self.caches: dict[str, FeatureCache] = {}
        for dtype in ("float16", "float32"):
            cache = FeatureCache(cache_dir(), inputs.encoder.fingerprint, dtype)
            about = inputs.encoder.describe()
            cache.fill(self.encoder, self.want, inputs.reader.read, 4.0, about)
            self.caches[dtype] = cache
        brick, cache = self.brick(), self.caches["float16"]
        place = Placeholder(brick.modality, brick.sentinel, brick.count, cache.length)
        task, _ = aligned.encode_all(inputs.checked, self.backbone, place, cache, config["seed"])
        assert isinstance(task.train, ItemRows)
        self.spec, self.rows = task.spec, task.train

    def brick(self) -> Any:
        """The connector as it starts."""
        made = align.new_brick(self.config, self.inputs.encoder, self.encoder.width, self.backbone)
        seen = sorted({item for row in self.inputs.checked.rows["train"] for item in hashes(row)})
        made.standardise(torch.from_numpy(aligned.some_vectors(self.caches["float16"], seen)))
        return made

    def trained(self, rows: ItemRows) -> Turn:
        """The project's trainer on some rows."""
        import pytorch_lightning as pl

        turn = Turn([], [])

        class Keep(pl.Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
                turn.seconds.append(outputs["seconds"])
                turn.losses.append(outputs["train/loss"])

        folder = self.folder / f"turn{time.monotonic_ns()}"
        folder.mkdir(parents=True)
        with tracked(self.config, folder) as wandb:
            fit(
                self.backbone,
                self.brick(),
                {"items": TaskData(self.spec, rows, None, None)},
                self.config["trainer"],
                seed=self.config["seed"],
                mixture=1.0,
                folder=folder,
                position=Position(0, None, False),
                metrics=MetricsFile(folder / "metrics.jsonl"),
                wandb=wandb,
                callbacks=[Keep()],
            )
        return turn

    def cached(self, dtype: str) -> Turn:
        """Features from the cache."""
        return self.trained(replace(self.rows, source=self.caches[dtype].read))

    def encoding(self) -> Turn:
        """The encoder in each step."""
        read = self.inputs.reader.read
        live = Live(
            **{one.name: getattr(self.rows, one.name) for one in fields(self.rows) if one.init},
            encode=lambda items: features_of(self.encoder, items, self.want, read),
        )
        return self.trained(live)

    def alone(self) -> Turn:
        """A plain loop; its batches are in memory before the clock starts."""
        settings, turn, brick = self.config["trainer"], Turn([], []), self.brick()
        stream = BatchStream(
            {"items": self.rows.lengths},
            tokens_per_batch=settings["tokens_per_batch"],
            rows_per_batch=settings["rows_per_batch"],
            seed=self.config["seed"],
            mixture=1.0,
        )
        rows = replace(self.rows, source=self.caches["float32"].read)
        pad = self.backbone.tokenizer.pad_token_id
        data, total = StepDataset(stream, {"items": rows}, 1, pad), settings["max_steps"]
        batches = [data.group_at(step)[0] for step in range(total)]
        model, learned = self.backbone.model, list(brick.parameters())
        embed = model.get_input_embeddings()
        optimizer = torch.optim.AdamW(learned, settings["learning_rate"], weight_decay=0.0)
        schedule = {key: settings[key] for key in ("warmup", "schedule")}
        before = time.perf_counter()
        for step, batch in enumerate(batches):
            rate = settings["learning_rate"] * factor(step, total=total, **schedule)
            optimizer.param_groups[0]["lr"] = rate
            features, mask = batch["image/features"], batch["image/mask"]
            tokens, there = brick.tokens_of(features, mask)
            ids = batch["input_ids"]
            embedded = embed(ids.clamp_min(0))
            embedded = embedded.masked_scatter((ids < 0)[..., None], tokens[there])
            wanted = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
            places = (wanted != IGNORED).any(0).nonzero()[:, 0]
            logits = model(
                inputs_embeds=embedded,
                attention_mask=batch["attention_mask"],
                logits_to_keep=places,
                use_cache=False,
            ).logits
            loss = F.cross_entropy(logits.flatten(0, 1), wanted[:, places].flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(learned, settings["clip"])
            optimizer.step()
            turn.losses.append(loss.item())
            now = time.perf_counter()
            turn.seconds.append(now - before)
            before = now
        return turn


def apart(one: Turn, other: Turn) -> float:
    """The largest difference of two arms' losses."""
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))


def ratios(above: list[Turn], below: list[Turn]) -> dict[str, float]:
    """Ratio of two arms' seconds per step: median over the turns, lowest and highest."""
    found = [
        statistics.median(a.seconds) / statistics.median(b.seconds)
        for a, b in zip(above, below, strict=True)
    ]
    return {"median": statistics.median(found), "low": min(found), "high": max(found)}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backbone", type=Path)
    parser.add_argument("--items", type=int, default=640)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    shared = chosen.shared.absolute()
    files, root, encoder = rows_of("cifar10", shared, chosen.out.absolute())
    backbone = (chosen.backbone or brick_lm()).absolute()
    os.chdir(chosen.out)
    config = compose(
        [
            "recipe=modality/align",
            "name=steps",
            "backbone=hf",
            f"backbone.path={backbone}",
            *encoder,
            f"data.items={files['train']}",
            f"data.root={root}",
            f"data.limit={chosen.items}",
            "data.validation_fraction=0",
            "data.test_fraction=0",
            f"trainer.max_steps={chosen.steps}",
            "tracking=disabled",
        ]
    )
    bench = Bench(config, Path("turns").absolute())
    arms: dict[str, list[Turn]] = {"alone": [], "cached": [], "encoder": []}
    for number in range(chosen.turns):
        made = {
            "alone": bench.alone,
            "cached": lambda: bench.cached("float16"),
            "encoder": bench.encoding,
        }
        order = list(made)
        for name in order[number % 3 :] + order[: number % 3]:
            arms[name].append(made[name]())
    exact = bench.cached("float32")
    rows = config["trainer"]["rows_per_batch"]
    seconds = {
        name: statistics.median(statistics.median(turn.seconds) for turn in turns)
        for name, turns in arms.items()
    }
    result = {
        "backbone": backbone.name,
        "rows_per_step": rows,
        "milliseconds": {name: 1000 * one for name, one in seconds.items()},
        "samples_per_second": {name: rows / one for name, one in seconds.items()},
        "cached_over_alone": ratios(arms["cached"], arms["alone"]),
        "encoder_over_cached": ratios(arms["encoder"], arms["cached"]),
        "loss_difference": {
            "float32 cache, encoder in each step": apart(exact, arms["encoder"][0]),
            "float16 cache, encoder in each step": apart(arms["cached"][0], arms["encoder"][0]),
            "float32 cache, plain loop": apart(exact, arms["alone"][0]),
        },
        "losses": [exact.losses[0], exact.losses[-1]],
        "target": 1.1,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
