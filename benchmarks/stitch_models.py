"""Stitching two language models of different widths by a linear bridge: what does the stitch cost?

    python benchmarks/stitch_models.py --models ../shared/models --corpora ../shared/data/corpora

Two small Llamas that were trained on TinyStories with one tokenizer, lm-tiny1m (4 layers, width
128) and lm-stories260k (5 layers, width 64), in both directions. Text: the TinyStories sample, in
passages of about 600 characters at paragraph borders; the first 70 % are for fitting, the next 10 %
for validation, the rest and the sample's own validation file for test, so that no story stands in
two splits but at a border.

For each direction the stitch point of highest CKA and another one: as deep as both models allow for
the small one below, in the middle for the large one. λ and the kept checkpoint are chosen on
validation rows; the table shows test rows, and marks the configuration that is best on validation.
It must keep what is promised (exit code 1 else): closed form better than random, trained better
than closed form, and its perplexity below that of lm-stories260k.

Figures are nats per token and perplexity; the penalty is against the top model; the order effect is
the loss of the opposite order minus that of this one, both in closed form. Intervals are 95 %
bootstrap intervals over passages, paired where they are of a difference.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LARGE, SMALL = "lm-tiny1m", "lm-stories260k"
#: (bottom, top, how the stitch point is found)
CONFIGURATIONS = [
    (LARGE, SMALL, {"at": "auto"}),
    (LARGE, SMALL, {"at": "[3,3]"}),
    (SMALL, LARGE, {"at": "auto"}),
    (SMALL, LARGE, {"at": "[5,3]"}),
]


def passages(path: Path, least: int = 600) -> list[str]:
    """Paragraphs of a file put together until they have ``least`` characters."""
    found, current = [], ""
    for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
        current = f"{current}\n\n{paragraph.strip()}".strip()
        if len(current) >= least:
            found.append(current)
            current = ""
    return [*found, current] if current else found


def write_splits(corpora: Path, folder: Path) -> dict[str, Path]:
    """The three splits as JSONL."""
    train = passages(corpora / "tinystories_sample.train.txt")
    a, b = int(0.7 * len(train)), int(0.8 * len(train))
    held_out = passages(corpora / "tinystories_sample.valid.txt")
    files = {}
    for name, texts in (
        ("train", train[:a]),
        ("validation", train[a:b]),
        ("test", [*train[b:], *held_out]),
    ):
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return files


def one(
    bottom: str, top: str, point: dict[str, str], options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """One run of the recipe; its record."""
    from cfm_train.launch.job import prepare

    name = f"{bottom}-{top}-" + "-".join(re.sub(r"\W+", "_", v) for v in point.values())
    files = write_splits(options.corpora, folder)
    job = prepare(
        [
            "recipe=stitch/bridge",
            f"name={name}",
            f"seed={options.seed}",
            f"bottom={options.models / bottom}",
            f"top={options.models / top}",
            *(f"{key}={value}" for key, value in point.items()),
            *(f"data.{split}={path}" for split, path in files.items()),
            f"trainer.max_steps={options.steps}",
            f"trainer.validate_every={max(1, options.steps // 10)}",
            f"trainer.learning_rate={options.rate}",
            f"trainer.tokens_per_batch={options.tokens}",
            "tracking=disabled",
            f"outputs={folder}",
            f"library={folder}/library",
        ]
    )
    record = job.start()
    validation = [
        json.loads(line).get("validation/loss")
        for line in (job.folder / "metrics.jsonl").read_text().splitlines()
    ]
    return {
        "bottom": bottom,
        "top": top,
        "point": point,
        "validation": min(v for v in validation if v is not None),
        "at": json.loads((Path(record["brick"]["path"]) / "brick.json").read_text())["interface"][
            "hyper"
        ]["at"],
        "metrics": record["metrics"],
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| bottom → top | at | bridge | loss | perplexity | penalty (nats/token) | minus "
        f"{SMALL} | order effect |",
        "|---|---|---|---|---|---|---|---|",
    ]
    best = min(results, key=lambda result: result["validation"])
    metrics = results[0]["metrics"]
    for model in (LARGE, SMALL):
        half = "bottom" if results[0]["bottom"] == model else "top"
        loss, ppl = (metrics[f"test/{half} model/{m}"] for m in ("loss", "perplexity"))
        lines.append(f"| {model} alone | | | {shown(loss)} | {shown(ppl)} | | | |")
    for result in results:
        where = f"{result['bottom']} → {result['top']}"
        how = "CKA" if result["point"]["at"] == "auto" else "given"
        mark = " **(best on validation)**" if result is best else ""
        small = small_of(result)
        for arm in ("random bridge", "closed form", "trained bridge"):
            keys = [
                f"test/{arm}/loss",
                f"test/{arm}/perplexity",
                f"penalty/{arm}/loss",
                f"{small}/{arm}/loss",
            ]
            cells = " | ".join(shown(result["metrics"][key]) for key in keys)
            named = (f"{where}{mark}", f"{result['at']} ({how})")
            effect = result["metrics"].get(f"order effect/{arm}/loss")
            cells += f" | {shown(effect) if effect else ''}"
            left = " | ".join(named if arm == "random bridge" else ("", ""))
            lines.append(f"| {left} | {arm} | {cells} |")
    return "\n".join(lines)


def small_of(result: dict[str, Any]) -> str:
    """What the record calls the difference from the small model."""
    return "penalty" if result["top"] == SMALL else "against bottom model"


def verdict(results: list[dict[str, Any]]) -> dict[str, bool]:
    """What must hold, of the configuration that is best on validation.

    Intervals of the first two must not touch; the last one says on which side of zero the paired
    interval of the difference lies, beside the figure itself.
    """
    best = min(results, key=lambda result: result["validation"])
    metrics = best["metrics"]
    random, closed, trained = (
        metrics[f"test/{arm}/perplexity"]
        for arm in ("random bridge", "closed form", "trained bridge")
    )
    paired = metrics[f"{small_of(best)}/trained bridge/perplexity"]
    return {
        "closed form better than random": closed["high"] < random["low"],
        "trained better than closed form": trained["high"] < closed["low"],
        f"trained better than {SMALL}": paired["value"] < 0,
        f"trained better than {SMALL}, whole interval": paired["high"] < 0,
    }


def shown(figure: dict[str, Any]) -> str:
    """A figure with its interval."""
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def main() -> int:
    """Runs every configuration and prints the table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--tokens", type=int, default=1024, help="of one step")
    parser.add_argument("--rate", type=float, default=0.005)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of configurations, from 0")
    parser.add_argument("--outputs", type=Path, help="keep the runs here, to be taken up again")
    options = parser.parse_args()
    options.models, options.corpora = options.models.resolve(), options.corpora.resolve()
    chosen = options.only if options.only is not None else range(len(CONFIGURATIONS))
    with tempfile.TemporaryDirectory() as aside:
        # The texts lie with the runs: a run is known by its config, and that names them.
        folder = options.outputs.resolve() if options.outputs else Path(aside)
        folder.mkdir(parents=True, exist_ok=True)
        results = [one(*CONFIGURATIONS[n], options=options, folder=folder) for n in chosen]
    print(table(results))
    kept = verdict(results)
    for sentence, holds in kept.items():
        print(f"{sentence}: {'holds' if holds else 'does not hold'}")
    return 0 if all(list(kept.values())[:3]) else 1


if __name__ == "__main__":
    sys.exit(main())
