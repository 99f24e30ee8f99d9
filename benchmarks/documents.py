"""Documents that a language model never saw, as bricks: three arms, and two bricks at once.

    python benchmarks/documents.py --backbone DIR --root CORPORA --out documents.json

Four documents are cut from the validation text of four domains of ``--root``. Of the first two a
LoRA brick (language modelling, and context distillation), a cartridge and an encoded document are
made, and the same cloze questions are asked with the text in the prompt, with the brick, and with
both. Then cartridges of both are plugged in together, once trained alone (the control) and once
trained among cartridges of the other two documents (distractor mixing). Two Markdown tables:

    arms       exact match of written answers and nats per answer token, with paired gains
    together   what is left of a cartridge's gain over the bare backbone beside the other one

With ``--domains a,b`` a third one: a LoRA brick of each domain against full fine-tuning on as many
tokens, each at its best learning rate by the loss on text held out of the training file, reported
on the validation file: the share of full fine-tuning's gain in nats per token.

What is trained already is taken from ``--work``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

#: The two documents that are judged, and the two whose cartridges are distractors.
DOMAINS = ("law_dc_code", "medical_abstracts")
OTHERS = ("wikipedia", "classic_fiction")
#: How bricks are made of a document.
WAYS = {
    "LoRA, lm": ["recipe=knowledge/lora"],
    "LoRA, distill": ["recipe=knowledge/lora", "objective=distill"],
    "cartridge": ["recipe=knowledge/cartridge"],
    "document": ["recipe=knowledge/prefix"],
}
#: Learning rates that are tried, for LoRA and for all weights.
RATES = {"lora": (5e-4, 1e-3, 2e-3, 5e-3), "full": (1e-4, 2e-4, 5e-4, 1e-3)}


def run(options: argparse.Namespace, *overrides: str) -> dict[str, Any]:
    """One run of the project, in this process; its record."""
    from cfm_train.launch.job import prepare

    common = ["tracking.mode=disabled", f"outputs={options.work}", "backbone.dtype=float32"]
    common += [f"backbone.path={options.backbone}", f"seed={options.seed}"]
    common += [f"library={options.work}/library", "trainer.samples=0"]
    return prepare([*overrides, *common]).start()


def documents(options: argparse.Namespace) -> dict[str, Path]:
    """The beginnings of the domains' validation texts, as files; ended at a paragraph."""
    found = {}
    for name in (*DOMAINS, *OTHERS):
        text = (Path(options.root) / f"{name}.valid.txt").read_text(encoding="utf-8")
        part = text[: options.characters].rpartition("\n")[0]
        path = Path(options.work) / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(part + "\n", encoding="utf-8")
        found[name] = path
    return found


def study(
    options: argparse.Namespace, name: str, document: Path, overrides: Iterable[str]
) -> dict[str, Any]:
    """One brick of one document."""
    given = list(overrides)
    trained = "recipe=knowledge/prefix" not in given
    others = Path(options.root) / f"{options.unrelated}.valid.txt"
    return run(
        options,
        *given,
        f"name={name}",
        f"data.documents={document}",
        f"data.unrelated={others}",
        f"evaluation.bootstrap={options.bootstrap}",
        *([f"trainer.max_steps={options.steps}"] if trained else []),
        *([f"brick.tokens={options.tokens}"] if "lora" not in given[0] else []),
    )


def together(options: argparse.Namespace, names: Sequence[str], document: Path) -> dict[str, Any]:
    """What the first cartridge answers alone and beside the other, from its own questions."""
    from cfm_train.backbone.load import load_backbone
    from cfm_train.backbone.spec import resolve
    from cfm_train.bricks.stored import open_brick
    from cfm_train.knowledge.arms import ask, questions_of
    from cfm_train.knowledge.documents import read
    from cfm_train.knowledge.tokens import Reader
    from cfm_train.library.store import Library

    library = Library(f"{options.work}/library")
    cards = [library.find(name) for name in names]
    backbone = load_backbone(resolve({"path": str(options.backbone)}), dtype="float32")
    bricks = [open_brick(card, library, backbone) for card in cards]
    section = cards[0].recipe["data"]
    reader = Reader(
        read({**section, "documents": str(document)}),
        backbone.tokenizer,
        section["max_length"],
        section["context"],
    )
    _, plain = questions_of(reader, "test")
    sets = {"bare": [], "alone": bricks[:1], "together": bricks, "turned": bricks[::-1]}
    found = {}
    for name, plugged in sets.items():
        one = ask(backbone, plain, plugged, generate=True)
        assert one.exact is not None
        found[name] = {
            "loss": float(one.nats.sum() / one.tokens.sum()),
            "exact_match": float(one.exact.mean()),
        }
    return found


def kept(found: Mapping[str, Mapping[str, float]], metric: str) -> float:
    """The share of the gain over the bare backbone that is left beside another cartridge.

    The mean of both orders; 1 where nothing is lost, below 0 where it is worse than no brick.
    """
    gain = found["alone"][metric] - found["bare"][metric]
    both = (found["together"][metric] + found["turned"][metric]) / 2
    return (both - found["bare"][metric]) / gain if gain else float("nan")


def arms_table(records: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """The arms of all bricks as Markdown: exact match in percent, nats, gains with intervals."""
    lines = [
        "| document | brick | bare | text | brick | both | brick − bare | both − text | ppl × |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (document, way), arms in records.items():
        by_name = {arm["name"]: arm for arm in arms["arms"]}
        four = [by_name[name] for name in ("bare", "text", "brick", "both")]
        shown = [
            f"{100 * arm['exact_match']['value']:.1f} ({arm['loss']['value']:.2f})" for arm in four
        ]
        gains = {gain["arm"]: gain["exact_match"] for gain in arms["gains"][:2]}
        shown += [
            f"{100 * g['value']:+.1f} ({100 * g['low']:.1f} to {100 * g['high']:.1f})"
            for g in (gains["brick"], gains["both"])
        ]
        ratio = arms["unrelated"]["perplexity_ratio"]["value"]
        lines.append(f"| {document} | {way} | {' | '.join(shown)} | {ratio:.3f} |")
    return "\n".join(lines)


def together_table(found: Mapping[tuple[str, str], Mapping[str, Mapping[str, float]]]) -> str:
    """What is left of each cartridge's gain beside the other one, as Markdown."""
    lines = [
        "| document | trained | exact match alone | together | kept | kept of the gain in nats |",
        "|---|---|---|---|---|---|",
    ]
    for (document, how), one in found.items():
        both = (one["together"]["exact_match"] + one["turned"]["exact_match"]) / 2
        lines.append(
            f"| {document} | {how} | {100 * one['alone']['exact_match']:.1f} | {100 * both:.1f} | "
            f"{kept(one, 'exact_match'):.2f} | {kept(one, 'loss'):.2f} |"
        )
    return "\n".join(lines)


def domain(options: argparse.Namespace, name: str) -> dict[str, float]:
    """Nats per token on a domain's validation file: bare, with a LoRA brick, fully fine-tuned."""
    root, rows = Path(options.root), f"trainer.max_steps={options.steps}"
    data = [f"data.train={root}/{name}.train.txt", f"data.test={root}/{name}.valid.txt"]
    data.append(f"data.unit={options.unit}")
    best: dict[str, tuple[float, float]] = {}
    for rate in RATES["lora"]:
        record = run(
            options,
            "recipe=task/lm",
            f"name={name}-lora-{rate:g}",
            *data,
            rows,
            f"brick.rank={options.rank}",
            "brick.sites=[attn.q,attn.k,attn.v,attn.o,ffn.gate,ffn.up,ffn.down]",
            f"brick.learning_rate={rate}",
            "data.max_length=256",
        )
        folder = Path(options.work) / "runs"
        chosen = validation_loss(folder, f"{name}-lora-{rate:g}")
        best["lora"] = min(
            best.get("lora", (float("inf"), 0.0)), (chosen, record["metrics"]["test/loss"]["value"])
        )
    full = [fine_tuned(options, data, rate) for rate in RATES["full"]]
    bare = full[0]["bare"]
    best["full"] = min((one["validation"], one["test"]) for one in full)
    return {
        "bare": bare,
        "lora": best["lora"][1],
        "full": best["full"][1],
        "share": (bare - best["lora"][1]) / (bare - best["full"][1]),
    }


def validation_loss(runs: Path, name: str) -> float:
    """The lowest validation loss of a run."""
    (folder,) = runs.glob(f"*/{name}-*")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line).get("validation/loss") for line in lines]
    return min(value for value in found if value is not None)


def fine_tuned(options: argparse.Namespace, data: Sequence[str], rate: float) -> dict[str, float]:
    """Full fine-tuning on the rows and steps of the brick: the backbone itself is trained."""
    import tempfile

    from cfm_train.backbone.load import load_backbone
    from cfm_train.backbone.spec import resolve
    from cfm_train.config.compose import compose, option
    from cfm_train.data.encode import encode
    from cfm_train.data.sources import check
    from cfm_train.evaluation.evaluator import predict
    from cfm_train.paths import cache_dir
    from cfm_train.tracking.metrics_file import MetricsFile
    from cfm_train.tracking.wandb_run import WandbRun
    from cfm_train.training.checkpoint import read_position
    from cfm_train.training.fit import fit
    from cfm_train.training.whole_model import WholeModel

    given = ["recipe=task/lm", "name=full", f"backbone.path={options.backbone}"]
    section = compose([*given, *data, "data.max_length=256"])["data"]
    backbone = load_backbone(resolve({"path": str(options.backbone)}), dtype="float32")
    task = encode(check(section), backbone.tokenizer, cache_dir())
    assert task.test is not None and task.validation is not None
    bare = predict(backbone, None, task.spec, task.test).loss()
    trainer = option("trainer", "default", learning_rate=rate)
    trainer |= {"max_steps": options.steps, "samples": 0}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        fit(
            backbone,
            WholeModel().build(backbone),
            {"full": task},
            trainer,
            seed=options.seed,
            mixture=1.0,
            folder=folder,
            position=read_position(folder / "checkpoints"),
            metrics=MetricsFile(folder / "metrics.jsonl"),
            wandb=WandbRun("disabled", "p", None, "train", [], {}, folder),
        )
    return {
        "bare": bare,
        "validation": predict(backbone, None, task.spec, task.validation).loss(),
        "test": predict(backbone, None, task.spec, task.test).loss(),
    }


def main() -> None:
    """Trains what is missing, measures, prints the tables and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", required=True, help="folder of a language model")
    parser.add_argument("--root", required=True, help="folder of DOMAIN.train.txt and .valid.txt")
    parser.add_argument("--work", default="outputs/documents")
    parser.add_argument("--out", default=None, help="a JSON file for the figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--characters", type=int, default=20_000, help="of each document")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=128, help="of a cartridge")
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--unrelated", default="tinystories_sample", help="a domain of its own")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--domains", nargs="*", default=[])
    parser.add_argument("--unit", default="file", choices=["file", "paragraph", "line"])
    parser.add_argument("--rank", type=int, default=32)
    options = parser.parse_args()
    files, records, both = documents(options), {}, {}
    for name in DOMAINS:
        for way in options.ways:
            made = study(options, f"{name}-{way.replace(', ', '-')}", files[name], WAYS[way])
            records[name, way] = made["arms"]
    if "cartridge" in options.ways:
        for name in OTHERS:
            study(options, f"{name}-cartridge", files[name], WAYS["cartridge"])
        others = f"distractors=[{','.join(f'{name}-cartridge' for name in OTHERS)}]"
        for name in DOMAINS:
            study(options, f"{name}-mixed", files[name], [*WAYS["cartridge"], others])
        for how, ending in (("alone", "cartridge"), ("among others", "mixed")):
            for one, other in (DOMAINS, DOMAINS[::-1]):
                names = [f"{one}-{ending}", f"{other}-{ending}"]
                both[one, how] = together(options, names, files[one])
    domains = {name: domain(options, name) for name in options.domains}
    print(arms_table(records), "\n")
    if both:
        print(together_table(both), "\n")
    for name, one in domains.items():
        print(f"{name}: {json.dumps({key: round(value, 4) for key, value in one.items()})}")
    if options.out:
        figures = {
            "arms": {" / ".join(key): arms for key, arms in records.items()},
            "together": {" / ".join(key): one for key, one in both.items()},
            "domains": domains,
        }
        Path(options.out).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
