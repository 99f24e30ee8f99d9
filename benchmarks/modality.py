"""A frozen language model that sees and hears: class accuracy through text, against a ridge probe.

    python -m benchmarks.modality digits|cifar10|mnist|nlvr --shared FOLDER --out FOLDER

Each trains a connector with recipe=modality/align and scores the classes with
recipe=modality/classify: accuracy, the same with shuffled items, always the most frequent class,
and a ridge probe on the same features. Targets: spoken digits 0.93, CIFAR-10 0.67 and at most 0.02
below the probe, MNIST 0.95; NLVR is reported. JPEG images (CIFAR-10) need Pillow.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.carried import brick_lm

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@dataclass(frozen=True)
class Task:
    """How a task is trained, and what must come out.

    Attributes:
        connector: kind and settings.
        steps: of training.
        target: least accuracy; None where it is reported alone.
        probe: whether a ridge probe reads the same features (one vector for each row).
    """

    connector: tuple[str, ...]
    steps: int
    target: float | None
    probe: bool = True


#: MNIST's raw pixels need more than a linear map; NLVR has three boxes in each prompt.
TASKS = {
    "digits": Task(("connector=linear",), 400, 0.93),
    "cifar10": Task(("connector=linear",), 800, 0.67),
    "mnist": Task(
        (
            "connector=mlp",
            "connector.inner=1024",
            "connector.tokens=2",
            "trainer.learning_rate=2e-3",
        ),
        600,
        0.95,
        probe=False,
    ),
    "nlvr": Task(("connector=mlp", "connector.tokens=2"), 60, None, probe=False),
}


def rows_of(task: str, shared: Path, out: Path) -> tuple[dict[str, Path], str, list[str]]:
    """Writes the rows of a task; gives the files by split, ``data.root``, and the encoder."""
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    root = shared / "data"
    if task == "nlvr":
        archive = _nlvr(root / "images", out, rows)
        encoder = ["encoder=patches", "encoder.size=20", "encoder.patch=20"]
    else:
        if task == "digits":
            archive, key = root / "audio" / "fsdd_subset.zip", "audio"
            folder = shared / "models" / "audio-speech-embedding"
            encoder = ["encoder=speech", f"encoder.path={folder}"]
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


def _nlvr(folder: Path, out: Path, rows: dict[str, list[dict[str, Any]]]) -> Path:
    """NLVR's statements (Suhr et al. 2017): each picture's three boxes are images of their own."""
    from cfm_train.modality.images import read_image

    path = out / "nlvr.zip"
    pictures = zipfile.ZipFile(folder / "nlvr_subset.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for line in (folder / "nlvr.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            picture = read_image(pictures.read(row["image"]), row["image"])
            parts: list[dict[str, str]] = []
            for box in range(3):
                held = io.BytesIO()
                np.save(held, picture[:, 150 * box : 150 * box + 100])
                name = f"{row['image']}.{box}.npy"
                archive.writestr(name, held.getvalue())
                parts.append({"type": "image", "image": name})
            parts.append({"type": "text", "text": f"\n{row['sentence']}"})
            answer = "true" if row["label"] else "false"
            messages = [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": answer},
            ]
            rows[row["split"]].append({"messages": messages})
    return path


def _mnist(folder: Path, out: Path) -> Path:
    """MNIST's 10,000 test images as a zip: 8,000 to train on, 2,000 to test on."""
    images, labels = (
        np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, -1, header)
        for name, header in (("t10k-images-idx3-ubyte.gz", 16), ("t10k-labels-idx1-ubyte.gz", 8))
    )
    path = out / "mnist.zip"
    if not path.exists():
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
        rows = read_rows(str(path), section, [found.modality], Reader(root, path.parent))
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
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backbone", type=Path)
    parser.add_argument("--items", type=int)
    parser.add_argument("--steps", type=int)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    shared, task = chosen.shared.absolute(), TASKS[chosen.task]
    files, root, encoder = rows_of(chosen.task, shared, chosen.out.absolute())
    backbone = (chosen.backbone or brick_lm()).absolute()
    os.chdir(chosen.out)
    aligned = command(
        "recipe=modality/align",
        f"name={chosen.task}",
        "backbone=hf",
        f"backbone.path={backbone}",
        *encoder,
        *task.connector,
        f"data.items={files['train']}",
        f"data.test={files['test']}",
        f"data.root={root}",
        *([f"data.limit={chosen.items}"] if chosen.items else []),
        f"trainer.max_steps={chosen.steps or task.steps}",
        "trainer.validate_every=100",
    )
    classed = command(
        "recipe=modality/classify",
        f"bricks=[{chosen.task}]",
        f"data.items={files['test']}",
        f"data.root={root}",
    )
    metrics = classed["metrics"]
    probed = task.probe and not chosen.items
    result = {
        "task": chosen.task,
        "backbone": backbone.name,
        "accuracy": metrics["test/accuracy"],
        "shuffled": metrics["shuffled/accuracy"],
        "majority": majority(files["test"]),
        "ridge": ridge(files, root, encoder) if probed else None,
        "target": task.target,
        "train_seconds": aligned["cost"]["train_seconds"],
        "text_logits": aligned["checks"]["text logits"]["value"],
    }
    print(json.dumps(result))


def majority(rows: Path) -> float:
    """Accuracy of always saying the test rows' most frequent class."""
    said = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    texts = [row["messages"][-1]["content"] if "messages" in row else row["text"] for row in said]
    return max(map(texts.count, set(texts))) / len(texts)


if __name__ == "__main__":
    main()
