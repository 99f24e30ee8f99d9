"""How much the order of two bricks matters: three pairs of bricks, three kinds, three modes.

    python benchmarks/order_effects.py --work /tmp/order --out order_effects.json

Trains LoRA, Pfeiffer and Houlsby bricks on the four small tasks that the project ships, on MiniLM
in float32, stitches three pairs of each kind, and prints a Markdown table:

    order effect   the largest change of a hidden state that the opposite order makes on real rows,
                   as a share of the largest change that the stitch makes
    a∘b, b∘a       accuracy of the stitch in both orders, each task with its own brick's head
    penalty        accuracy of the task's own brick alone minus that of the stitch, paired

and holds the folded sum of two LoRA bricks, and their merge in the space ``cat``, against both
bricks plugged in side by side, on all training rows. What is trained already is taken from
``--work``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PAIRS = (("tense", "claim"), ("tone", "request"), ("claim", "tone"))
TASKS = ("tense", "claim", "tone", "request")
#: The sites of LoRA are as wide as their input, so that all modes take them. Its scale, 13 / 8, is
#: no power of two, so that moving it into a factor rounds.
KINDS = {
    "lora": ["brick=lora", "brick.sites=[attn.q,attn.k,attn.v,attn.o]", "brick.alpha=13"],
    "pfeiffer": ["brick=pfeiffer"],
    "houlsby": ["brick=houlsby"],
}
MODES = ("chain", "pipe", "sum")
#: How far a merge may be from both bricks plugged in side by side, by the largest hidden state.
CAT = 1e-6


def run(options: argparse.Namespace, *overrides: str) -> dict[str, Any]:
    """One run of the project, in this process; its record."""
    from cfm_train.launch.job import prepare

    common = ["tracking.mode=disabled", f"outputs={options.work}"]
    common += [f"seed={options.seed}", f"library={options.work}/library"]
    return prepare([*overrides, *common]).start()


def train(options: argparse.Namespace) -> None:
    """One brick for each kind and task."""
    for kind in dict.fromkeys(["lora", *options.kinds]):  # LoRA for the merges in space cat
        for task in TASKS:
            run(
                options,
                f"recipe=task/quick_{task}",
                f"name={kind}-{task}",
                *KINDS[kind],
                "backbone.dtype=float32",
                f"trainer.max_steps={options.steps}",
                "trainer.samples=0",
                f"evaluation.bootstrap={options.bootstrap}",
            )


def stitch(options: argparse.Namespace, kind: str, pair: tuple[str, str], mode: str) -> Any:
    """The figures of one stitch, from its record."""
    one, two = (f"{kind}-{task}" for task in pair)
    tasks = [f"quick_{task}" for task in pair]
    record = run(
        options,
        f"recipe=stitch/{mode}",
        f"bricks=[{one},{two}]",
        f"name={kind}-{mode}-{pair[0]}-{pair[1]}",
        f"tasks=[{','.join(tasks)}]",
        f"evaluation.bootstrap={options.bootstrap}",
    )
    failed = [name for name, check in record["checks"].items() if not check["passed"]]
    rows: dict[str, dict[str, float]] = {}
    for cell in record["matrix"]:
        rows.setdefault(cell["brick"], {})[cell["task"]] = cell["value"]
    labels = ["a∘b", "b∘a", "average", "a", "b"]
    if len(rows) < len(labels):  # kinds that have no average
        labels.remove("average")
    return {
        "kind": kind,
        "mode": mode,
        "pair": list(pair),
        "order effect": record["metrics"]["order effect"]["value"],
        "accuracy": dict(zip(labels, rows.values(), strict=True)),
        "penalty": {
            task: record["metrics"][f"stitching penalty/{task}/accuracy"] for task in tasks
        },
        "failed": failed,
    }


def in_half(options: argparse.Namespace, kind: str, pair: tuple[str, str]) -> float:
    """The order effect of a sum in bfloat16: all of it is rounding."""
    record = run(
        options,
        "recipe=stitch/sum",
        "backbone=minilm",
        "backbone.dtype=bfloat16",
        f"bricks=[{kind}-{pair[0]},{kind}-{pair[1]}]",
        f"name={kind}-half",
    )
    return float(record["metrics"]["order effect"]["value"])


def side_by_side(options: argparse.Namespace, pair: tuple[str, str]) -> dict[str, float]:
    """How far merges of two LoRA bricks are from both plugged in, by the largest hidden state."""
    from cfm_train.configuration.apply import assemble
    from cfm_train.configuration.parser import parse
    from cfm_train.configuration.pin import pin
    from cfm_train.data.encode import encode
    from cfm_train.operations.selection import find_tasks, select
    from cfm_train.operations.setting import open_backbone
    from cfm_train.operations.stitched import probe_of
    from cfm_train.paths import cache_dir
    from cfm_train.stitching.fold import fold
    from cfm_train.stitching.promises import Probe, relative

    names = [f"lora-{task}" for task in pair]
    selection = select({"bricks": names, "library": f"{options.work}/library", "backbone": None})
    backbone, _ = open_backbone(selection.backbone, selection.section)
    bricks = [assemble(tree, selection.library, backbone) for tree in selection.trees]
    listed = ", ".join(names)

    def made(text: str) -> Any:
        return assemble(pin(parse(text), selection.library), selection.library, backbone)

    merges = {
        "folded sum": fold(made(f"stitch([{listed}], mode=sum)"), backbone),
        "merge in space cat": made(f"merge(linear, [{listed}], weights=[1.0, 1.0], space=cat)"),
    }
    cards = list(selection.cards.values())
    found = dict.fromkeys(merges, 0.0)
    for name, task in find_tasks([], cards, {"root": None, "limit": None}).items():
        data = encode(task, backbone.tokenizer, cache_dir())
        probe: Probe = probe_of(backbone, {name: data}, rows=len(data.train))
        expected = probe.ask(*bricks)
        for label, merged in merges.items():
            found[label] = max(found[label], relative(probe.ask(merged), expected))
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| kind | a, b | mode | order effect | a∘b on a / b | b∘a | average | a alone | b alone | "
        "penalty on a | penalty on b |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        tasks = [f"quick_{task}" for task in row["pair"]]

        def both(label: str, row: Any = row, tasks: Any = tasks) -> str:
            found = row["accuracy"].get(label)
            return "–" if found is None else " / ".join(f"{100 * found[t]:.1f}" for t in tasks)

        def penalty(task: str, row: Any = row) -> str:
            value = row["penalty"][task]
            numbers = [100 * value[key] for key in ("value", "low", "high")]
            return "{:.1f} [{:.1f}, {:.1f}]".format(*numbers)

        cells = [row["kind"], ", ".join(row["pair"]), row["mode"], f"{row['order effect']:.2%}"]
        cells += [both(label) for label in ("a∘b", "b∘a", "average", "a", "b")]
        cells += [penalty(task) for task in tasks]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and bricks")
    parser.add_argument("--out", type=Path, help="a JSON file with every figure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of each brick")
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    train(options)
    rows = [
        stitch(options, kind, pair, mode)
        for kind in options.kinds
        for pair in PAIRS
        for mode in MODES
    ]
    half = {kind: in_half(options, kind, PAIRS[0]) for kind in options.kinds}
    cat = {", ".join(pair): side_by_side(options, pair) for pair in PAIRS}
    print(markdown(rows))
    print("\norder effect of a sum in bfloat16 (rounding): ", half)
    print("largest relative difference from both side by side:", json.dumps(cat, indent=2))
    worst = max(value for found in cat.values() for value in found.values())
    failed = [f"{r['kind']} {r['mode']}: {r['failed']}" for r in rows if r["failed"]]
    verdict = "holds" if worst <= CAT and not failed else "BROKEN"
    print(f"cat is the parallel sum to {CAT:g}: {worst:.2e}; failed checks: {failed}; {verdict}")
    if options.out:
        figures = {"rows": rows, "sum in bfloat16": half, "cat": cat}
        options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if verdict == "holds" else 1


if __name__ == "__main__":
    sys.exit(main())
