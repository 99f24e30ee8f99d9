"""Whole domains as bricks: against full fine-tuning, and two of them plugged in at once.

    python benchmarks/domains.py --root CORPORA --out domains.json

Of each domain a LoRA brick is trained on the beginning of its training file, and all weights of the
backbone on as many tokens of the same blocks; each at its best learning rate by the loss on the
training file's end, which neither was trained on. Then the two domains' bricks act together:

    sum           both plugged in, their updates added up: plain concatenation, the control
    merges        one brick made of both; what a rule leaves open is chosen on the files' ends
    mixed         the first trained again beside the second; then the second beside the new first
    mixed, keep   so, too, and each leaves what is said of the other's text as it is (KL)

Figures are nats per token of the validation files, with intervals over their blocks:

    share = (bare - brick) / (bare - full)              of full fine-tuning's gain
    kept  = (bare - together) / (bare - brick)          of the brick's own gain

What is trained already is taken from ``--work``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.carried import brick_lm, run
from benchmarks.domain_bricks import Judge, brick, fine_tuned, texts

if TYPE_CHECKING:
    import numpy as np

#: Merges of two bricks, with the numbers that are tried.
SCALES = (0.6, 0.7, 0.8, 0.9, 1.0)
MERGES = {
    "average": ["merge(linear, [{a}, {b}])"],
    "task arithmetic": [f"merge(task_arithmetic, [{{a}}, {{b}}], scale={s})" for s in SCALES],
    "TIES": [
        f"merge(ties/paper, [{{a}}, {{b}}], density={d}, scale={s})"
        for d in (0.5, 0.9)
        for s in (1.0, 1.3)
    ],
    "TIES, mergekit's": [
        f"merge(ties/mergekit, [{{a}}, {{b}}], density=0.9, scale={s})" for s in (1.0, 1.3)
    ],
    "TSV": [f"merge(tsv, [{{a}}, {{b}}], scale={s})" for s in (0.8, 1.0)],
    "RegMean": ["merge(regmean, [{a}, {b}])"],
}


def tuned_brick(options: argparse.Namespace, judge: Judge, name: str) -> tuple[str, float]:
    """A domain's brick at its best rate, and that rate."""
    learnt = judge.files[name]["learnt"]
    tried = {}
    for rate in options.lora_rates if len(options.lora_rates) > 1 else ():
        short = brick(options, name, learnt, rate, steps=options.tuning)
        tried[rate] = judge.mean(name, "chosen", [judge.open(short)])
    print(f"{name}, LoRA: {told(tried)}", flush=True)
    rate = min(tried or options.lora_rates, key=lambda one: tried.get(one, 0.0))
    return brick(options, name, learnt, rate, steps=options.steps), rate


def tuned_full(options: argparse.Namespace, judge: Judge, name: str) -> dict[str, Any]:
    """All weights trained on a domain at their best rate: what the blocks cost then."""
    decides = ("backbone", "seed", "steps", "tuning", "tokens", "characters", "held", "judged")
    key = "-".join(str(getattr(options, one)) for one in (*decides, "full_rates"))
    kept = Path(options.work) / f"full-{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    tried = {
        rate: float(fine_tuned(options, judge, name, rate, options.tuning, "chosen"))
        for rate in (options.full_rates if len(options.full_rates) > 1 else ())
    }
    print(f"{name}, full: {told(tried)}", flush=True)
    rate = min(tried or options.full_rates, key=lambda one: tried.get(one, 0.0))
    found = fine_tuned(options, judge, name, rate, options.steps, "judged", rows=True)
    held = {"rate": rate, "nats": found.tolist(), "tried": {f"{r:g}": v for r, v in tried.items()}}
    kept.write_text(json.dumps(held), encoding="utf-8")
    return held


def told(tried: Mapping[float, float]) -> str:
    """What each learning rate came to on the text that chooses."""
    return (
        ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in tried.items()) or "one rate, not tuned"
    )


def share_of(bare: np.ndarray, found: np.ndarray, whole: np.ndarray, bootstrap: int) -> Any:
    """The share of one gain over the bare backbone in another, with its interval over blocks.

    Args:
        bare, found, whole: nats of each block ``[blocks]``.
        bootstrap: number of resamples.
    """
    import numpy as np

    from cfm_train.evaluation.intervals import intervals

    def share(weights: np.ndarray) -> np.ndarray:
        return (weights @ (bare - found)) / (weights @ (bare - whole))

    counts = np.ones(len(bare), np.int64)
    return intervals({"share": share}, counts, bootstrap=bootstrap, seed=0)["share"].as_dict()


def together(
    options: argparse.Namespace, judge: Judge, own: Mapping[str, tuple[str, float]]
) -> Iterator[tuple[str, list[Any]]]:
    """Each way of having two domains' bricks act at once: what it is called, what is plugged in."""
    (first, (a, rate_a)), (second, (b, rate_b)) = own.items()
    yield "sum of both (control)", [judge.open(a), judge.open(b)]
    bare = {name: judge.mean(name, "chosen", []) for name in own}
    single = {name: judge.mean(name, "chosen", [judge.open(own[name][0])]) for name in own}
    run(options, "recipe=analyze/gram", f"bricks=[{a},{b}]", trains=False)
    for called, tried in MERGES.items():
        worst: dict[str, float] = {}
        for expression in (text.format(a=a, b=b) for text in tried):
            made = [judge.open(expression)] if len(tried) > 1 else []
            worst[expression] = min(
                (bare[n] - judge.mean(n, "chosen", made)) / (bare[n] - single[n]) if made else 0.0
                for n in own
            )
        chosen = max(worst, key=lambda one: worst[one])
        numbers = chosen.partition("], ")[2].rstrip(")")
        yield f"{called}{f' ({numbers})' if numbers else ''}", [judge.open(chosen)]
    files = judge.files
    steps = options.steps
    for kept in (False, True):
        own_text, other_text = (files[name]["kept"] if kept else None for name in (first, second))
        new = brick(
            options, first, files[first]["learnt"], rate_a, steps=steps, beside=b, kept=other_text
        )
        how = f"mixed{', keep' if kept else ''}"
        yield f"sum, {first} trained beside the other ({how})", [judge.open(new), judge.open(b)]
        last = brick(
            options, second, files[second]["learnt"], rate_b, steps=steps, beside=new, kept=own_text
        )
        yield f"sum, then the other beside it ({how})", [judge.open(new), judge.open(last)]


def main() -> None:
    """Trains what is missing, measures, prints the tables and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default=None, help="a folder; brick_lm where left out")
    parser.add_argument("--root", required=True, help="folder of DOMAIN.train.txt and .valid.txt")
    parser.add_argument("--domains", nargs=2, default=["law_dc_code", "medical_abstracts"])
    parser.add_argument("--work", default="outputs/domains")
    parser.add_argument("--out", default=None, help="a JSON file for the figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--tuning", type=int, default=30, help="steps at each learning rate")
    parser.add_argument("--lora_rates", type=float, nargs="+", default=[5e-3, 1e-2, 2e-2])
    parser.add_argument("--full_rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--characters", type=int, default=1_000_000, help="that are learnt")
    parser.add_argument("--held", type=int, default=40_000, help="characters that choose")
    parser.add_argument("--judged", type=int, default=0, help="characters; 0 for all")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--keep", type=float, default=1.0, help="weight of the other's text")
    parser.add_argument("--bootstrap", type=int, default=1000)
    options = parser.parse_args()
    options.backbone = options.backbone or brick_lm()
    judge = Judge(options, {name: texts(options, name) for name in options.domains})
    bare = {name: judge.nats(name, "judged", []) for name in options.domains}
    own = {name: tuned_brick(options, judge, name) for name in options.domains}
    alone = {name: judge.nats(name, "judged", [judge.open(own[name][0])]) for name in own}
    figures: dict[str, Any] = {"domains": {}, "together": {}}
    for called, plugged in together(options, judge, own):
        figures["together"][called] = {
            name: share_of(
                bare[name][0],
                judge.nats(name, "judged", plugged)[0],
                alone[name][0],
                options.bootstrap,
            )
            for name in own
        }
        line = [f"{s['value']:.2f}" for s in figures["together"][called].values()]
        print(f"{called}: kept {' / '.join(line)}", flush=True)
        write(options, figures)
    for name in own:
        full = tuned_full(options, judge, name)
        per = bare[name][1].sum()
        figures["domains"][name] = {
            "bare": bare[name][0].sum() / per,
            "lora": alone[name][0].sum() / per,
            "full": sum(full["nats"][0]) / per,
            "rates": {"lora": own[name][1], "full": full["rate"]},
            "share": share_of(bare[name][0], alone[name][0], full["nats"][0], options.bootstrap),
        }
        write(options, figures)
    print(tables(figures))


def write(options: argparse.Namespace, figures: Mapping[str, Any]) -> None:
    """What is known so far, where it is wanted."""
    if options.out:
        Path(options.out).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def tables(figures: Mapping[str, Any]) -> str:
    """Both tables as Markdown."""
    lines = [
        "",
        "| domain | bare | LoRA | full fine-tuning | share of the gain |",
        "|---|---|---|---|---|",
    ]
    for name, one in figures["domains"].items():
        rates = one["rates"]
        lines.append(
            f"| {name} | {one['bare']:.3f} | {one['lora']:.3f} (rate {rates['lora']:g}) | "
            f"{one['full']:.3f} (rate {rates['full']:g}) | {shown(one['share'])} |"
        )
    names = list(figures["domains"])
    lines += ["", f"| both at once | kept on {names[0]} | kept on {names[1]} |", "|---|---|---|"]
    for called, one in figures["together"].items():
        lines.append(f"| {called} | {' | '.join(shown(one[name]) for name in names)} |")
    return "\n".join(lines)


def shown(score: Mapping[str, float]) -> str:
    """A share with its interval."""
    return f"{score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}]"


if __name__ == "__main__":
    main()
