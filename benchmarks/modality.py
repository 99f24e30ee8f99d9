"""A frozen language model that sees and hears: class accuracy through text, against a ridge probe.

    python -m benchmarks.modality digits|cifar10|mnist --shared FOLDER --out FOLDER

Each trains a connector with recipe=modality/align and scores the classes with
recipe=modality/classify: accuracy, the same with shuffled items, and a ridge probe on the same
features. Targets: spoken digits 0.93, CIFAR-10 0.67 and at most 0.02 below the probe, MNIST 0.95.
JPEG images (CIFAR-10) need Pillow.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TARGETS = {"digits": 0.93, "cifar10": 0.67, "mnist": 0.95}


def rows_of(task: str, shared: Path, out: Path) -> tuple[dict[str, Path], str, list[str]]:
    """Writes the rows of a task; gives the files by split, ``data.root``, and the encoder."""
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    root = shared / "data"
    if task == "digits":
        archive, key = root / "audio" / "fsdd_subset.zip", "audio"
        encoder = ["encoder=speech", f"encoder.path={shared / 'models' / 'audio-speech-embedding'}"]
    elif task == "cifar10":
        archive, key = root / "images" / "cifar10_subset.zip", "image"
        folder = shared / "models" / "vision-mobilenetv2-100-imagenet"
        encoder = ["encoder=mobilenet", f"encoder.path={folder}"]
    else:
        archive, key = _mnist(root / "images", out), "image"
        encoder = ["encoder=patches", "encoder.size=28", "encoder.patch=28"]
    for name in zipfile.ZipFile(archive).namelist():
        split, _, inner = name.partition("/")
        label = inner.split("/")[0] if task != "digits" else DIGITS[int(inner[0])]
        if split in rows and inner.count(".") == 1:
            rows[split].append({key: name, "text": label})
    files = {}
    for split, found in rows.items():
        files[split] = out / f"{task}.{split}.jsonl"
        files[split].write_text("\n".join(map(json.dumps, found)), encoding="utf-8")
    return files, str(archive), encoder


def _mnist(folder: Path, out: Path) -> Path:
    """MNIST's 10,000 test images as a zip: 8,000 to train on, 2,000 to test on."""
    images, labels = (
        np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, -1, header)
        for name, header in (("t10k-images-idx3-ubyte.gz", 16), ("t10k-labels-idx1-ubyte.gz", 8))
    )
    path = out / "mnist.zip"
    if not path.exists():
        import io

        with zipfile.ZipFile(path, "w") as archive:
            for i, (image, label) in enumerate(
                zip(images.reshape(-1, 28, 28), labels, strict=True)
            ):
                held = io.BytesIO()
                np.save(held, image)
                split = "test" if i % 5 == 4 else "train"
                archive.writestr(f"{split}/{DIGITS[label]}/{i:05d}.npy", held.getvalue())
    return path


def command(*arguments: str) -> dict[str, Any]:
    """Runs one command; gives its record."""
    done = subprocess.run(
        [sys.executable, "-m", "cfm_train", *arguments, "tracking=disabled"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    print(done.stdout)
    path = done.stdout.splitlines()[-1].removeprefix("record: ")
    return dict(json.loads(Path(path).read_text(encoding="utf-8")))


def ridge(files: dict[str, Path], root: str, encoder: list[str]) -> float:
    """Accuracy of a ridge probe on the very features, its penalty chosen on a tenth of train."""
    from cfm_train.config.compose import option
    from cfm_train.modality.cache import FeatureCache
    from cfm_train.modality.finding import find_encoder
    from cfm_train.modality.items import Reader, hashes, read_rows
    from cfm_train.paths import cache_dir

    values = {k.partition("=")[0].removeprefix("encoder."): k.partition("=")[2] for k in encoder}
    typed = {k: int(v) if v.isdigit() else v for k, v in values.items() if k != "encoder"}
    found = find_encoder(option("encoder", values["encoder"], **typed))
    cache = FeatureCache(cache_dir(), found.fingerprint, "float16")
    section = {"text": "text", "prompt": "<item>"}
    sides = {}
    for split, path in files.items():
        rows = read_rows(str(path), section, found.modality, Reader(root, path.parent))
        x = np.stack([cache.read(hashes(row)[0]).astype(np.float64).mean(0) for row in rows])
        sides[split] = x, np.array([row["answer"] for row in rows])
    (x, y), (other, right) = sides["train"], sides["test"]
    names = sorted(set(y))
    targets = np.stack([y == name for name in names], 1) * 2.0 - 1.0
    mean, spread = x.mean(0), x.std(0) + 1e-6
    x, other = ((np.c_[(one - mean) / spread, np.ones(len(one))]) for one in (x, other))
    held = np.arange(len(x)) % 10 == 0

    def weights(rows: np.ndarray, penalty: float) -> np.ndarray:
        gram = x[rows].T @ x[rows] + penalty * np.eye(x.shape[1])
        return np.linalg.solve(gram, x[rows].T @ targets[rows])

    def accuracy(w: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
        return float((np.array(names)[(a @ w).argmax(1)] == b).mean())

    best = max(
        (10.0**k for k in range(6)),
        key=lambda p: accuracy(weights(~held, p), x[held], y[held]),
    )
    return accuracy(weights(np.ones(len(x), bool), best), other, right)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=sorted(TARGETS))
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backbone", type=Path)
    parser.add_argument("--connector", default="linear")
    parser.add_argument("--items", type=int)
    parser.add_argument("--steps", type=int, default=800)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    shared = chosen.shared.absolute()
    files, root, encoder = rows_of(chosen.task, shared, chosen.out.absolute())
    os.chdir(chosen.out)
    backbone = (chosen.backbone or shared / "models" / "domain-lm-7m").absolute()
    aligned = command(
        "recipe=modality/align",
        f"name={chosen.task}",
        "backbone=hf",
        "backbone=hf",
        f"backbone.path={backbone}",
        *encoder,
        f"connector={chosen.connector}",
        f"data.items={files['train']}",
        f"data.test={files['test']}",
        f"data.root={root}",
        *([f"data.limit={chosen.items}"] if chosen.items else []),
        f"trainer.max_steps={chosen.steps}",
        "trainer.validate_every=200",
    )
    classed = command(
        "recipe=modality/classify",
        f"bricks=[{chosen.task}]",
        f"data.items={files['test']}",
        f"data.root={root}",
    )
    metrics = classed["metrics"]
    result = {
        "task": chosen.task,
        "accuracy": metrics["test/accuracy"],
        "shuffled": metrics["shuffled/accuracy"],
        "ridge": None if chosen.items else ridge(files, root, encoder),
        "target": TARGETS[chosen.task],
        "train_seconds": aligned["cost"]["train_seconds"],
        "text_logits": aligned["checks"]["text logits"]["value"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
