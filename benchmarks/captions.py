"""Captions of a frozen language model that sees: CIDEr-D on COCO images, against shuffled ones.

    python -m benchmarks.captions --shared FOLDER --out FOLDER [--backbone FOLDER]

A connector is trained on the captions of 80 images (five for each) with recipe=modality/align, and
recipe=modality/caption writes a caption for 79 others: CIDEr-D, the same with the images shuffled,
and the paired difference, whose interval must leave out zero. The encoder is MobileNetV2-100, with
a vector for each of 16 places of an image. JPEG images need Pillow.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from benchmarks.carried import brick_lm
from benchmarks.modality import command

#: COCO's own splits; those at hand hold 80 and 79 images.
SPLITS = {"train": "train2017", "test": "val2017"}


def rows_of(folder: Path, out: Path) -> dict[str, Path]:
    """Writes a row for each image, with all its captions; gives the files by split."""
    lines = (folder / "coco_captions.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    files = {}
    for split, name in SPLITS.items():
        rows = [
            json.dumps({"image": row["image"], "text": [text.strip() for text in row["captions"]]})
            for row in found
            if row["split"] == name
        ]
        files[split] = out / f"coco.{split}.jsonl"
        files[split].write_text("\n".join(rows), encoding="utf-8")
    return files


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backbone", type=Path)
    parser.add_argument("--set", action="append", default=[], help="more settings of align")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    shared = chosen.shared.absolute()
    files = rows_of(shared / "data" / "images", chosen.out.absolute())
    backbone = (chosen.backbone or brick_lm()).absolute()
    images = f"data.root={shared / 'data' / 'images' / 'coco_mini.zip'}"
    os.chdir(chosen.out)
    aligned = command(
        "recipe=modality/align",
        "name=captions",
        "backbone=hf",
        f"backbone.path={backbone}",
        "encoder=mobilenet",
        f"encoder.path={shared / 'models' / 'vision-mobilenetv2-100-imagenet'}",
        "encoder.pool=none",
        "connector=linear",
        "connector.tokens=1",
        f"data.items={files['train']}",
        f"data.test={files['test']}",
        images,
        "trainer.max_steps=100",
        "trainer.validate_every=20",
        "data.validation_fraction=0.1",
        *chosen.set,
    )
    said = command(
        "recipe=modality/caption", "bricks=[captions]", f"data.items={files['test']}", images
    )
    metrics = said["metrics"]
    result = {
        "backbone": backbone.name,
        **{name: metrics[name] for name in metrics},
        "loss": {
            name: aligned["metrics"][f"{name}/loss"]["value"] for name in ("test", "shuffled")
        },
        "train_seconds": aligned["cost"]["train_seconds"],
        "samples": [(one["prediction"], one["reference"][:60]) for one in said["samples"]],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
