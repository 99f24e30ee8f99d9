"""How fast the command line answers when there is nothing to compute.

    python benchmarks/startup.py

Whole processes, the median of several: the help, a misspelt key, and a misspelt key beside a
backbone folder of 16 GB (a sparse file; nothing may read it before the config is right).
"""

from __future__ import annotations

import json
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = 7
GIGABYTES = 16
PROMISED = {"help": 1.5, "misspelt key": 2.0, "misspelt key, 16 GB backbone": 2.0}


def large_backbone(folder: Path) -> Path:
    """A folder that looks like a model of 16 GB and takes no room."""
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    size = GIGABYTES * 10**9
    header = json.dumps(
        {"model.embed_tokens.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    ).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    return folder


def median_seconds(arguments: list[str], code: int) -> float:
    """Median wall time of a command that ends with this exit code."""
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "cfm_train", *arguments],
            cwd=ROOT,
            capture_output=True,
            check=False,
        )
        times.append(time.perf_counter() - started)
        assert done.returncode == code, done.stderr.decode()
    return statistics.median(times)


def main() -> None:
    """Prints a line for each command, with its promise."""
    folder = Path(tempfile.mkdtemp())
    try:
        large = large_backbone(folder)
        wrong = ["recipe=task/quick_tone", "brick.rnk=8"]
        cases = {
            "help": (["--help"], 0),
            "misspelt key": (wrong, 2),
            "misspelt key, 16 GB backbone": (
                [*wrong, "backbone=hf", f"backbone.path={large}"],
                2,
            ),
        }
        for name, (arguments, code) in cases.items():
            seconds = median_seconds(arguments, code)
            print(f"{name:30} {seconds:5.2f} s   (at most {PROMISED[name]} s)")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
