"""Documents that a language model never saw, as bricks: three arms, and two bricks at once.

    python benchmarks/documents.py --root CORPORA --out documents.json

Six documents are cut from the validation text of six domains of ``--root``. Of the first two a
LoRA brick (language modelling, and context distillation), a cartridge and an encoded document are
made, and the same cloze questions are asked with the text in the prompt, with the brick, and with
both. Then cartridges of several are plugged in together: trained alone (the control), and trained
again among those of all other documents (see `mixed`). What a brick costs is asked of text from
five other domains, some of which bricks leave as it is (`keep`).
Two Markdown tables:

    arms       exact match of written answers and nats per answer token, with paired gains
    together   what is left of a cartridge's gain over the bare backbone beside others

What is trained already is taken from ``--work``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.carried import brick_lm, run

#: The two documents of the arms, and the others.
DOMAINS = ("law_dc_code", "medical_abstracts")
OTHERS = ("wikipedia", "classic_fiction", "news", "shakespeare")
#: Those whose cartridges are plugged in together: the two whose cartridges write most answers when
#: alone, and medicine, whose domain the backbone never read either.
JUDGED = ("law_dc_code", "wikipedia", "medical_abstracts")
#: A cartridge's document, those beside it, and how they were trained.
Asked = tuple[str, str, str]
#: Text that has nothing to do with them: a piece of each, and how many characters it has.
UNRELATED = ("news", "python_code", "math_word_problems", "shakespeare", "wikipedia")
PIECE = 8_000
#: How bricks are made of a document.
WAYS = {
    "LoRA, lm": ["recipe=knowledge/lora", "objective.keep=0.3"],
    "LoRA, distill": ["recipe=knowledge/lora", "objective=distill", "objective.keep=0.3"],
    "cartridge": ["recipe=knowledge/cartridge"],
    # Short rows, for questions are short; kept quiet elsewhere, else two cannot stand together.
    "cartridge, lm": [
        "recipe=knowledge/cartridge",
        "objective=lm",
        "objective.keep=0.5",
        "data.max_length=32",
        "brick.learning_rate=5e-2",
    ],
    "document": ["recipe=knowledge/prefix"],
}


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
    rest = []
    for name in UNRELATED:  # from the end: a distractor's document is the beginning of one of them
        text = (Path(options.root) / f"{name}.valid.txt").read_text(encoding="utf-8")
        rest.append(text[-PIECE:].partition("\n")[2])
    found["unrelated"] = Path(options.work) / "unrelated.txt"
    found["unrelated"].write_text("\n\n".join(rest), encoding="utf-8")
    return found


def study(
    options: argparse.Namespace,
    name: str,
    files: Mapping[str, Path],
    way: Iterable[str],
    steps: int = 0,
) -> dict[str, Any]:
    """One brick of one document, called ``<document>-<what it is>``."""
    given = list(way)
    document = name.partition("-")[0]
    more = []
    if "recipe=knowledge/prefix" not in given and (steps or options.steps):
        more.append(f"trainer.max_steps={steps or options.steps}")
    if "recipe=knowledge/lora" not in given:
        more.append(f"brick.tokens={options.tokens}")
    return run(
        options,
        *given,
        f"name={name}",
        f"data.documents={files[document]}",
        f"data.unrelated={files['unrelated']}",
        f"evaluation.bootstrap={options.bootstrap}",
        *more,
        *options.more,
    )


def together(
    options: argparse.Namespace, names: Sequence[str], document: Path, positions: str
) -> dict[str, Any]:
    """What the first cartridge answers alone and beside the others, from its own questions."""
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
    for brick in bricks:  # alone, a cartridge learns the same whatever it would share
        brick.hyper["positions"] = positions
    section = cards[0].recipe["data"]
    reader = Reader(
        read({**section, "documents": str(document)}),
        backbone.tokenizer,
        section["max_length"],
        section["context"],
    )
    _, plain = questions_of(reader, "test")
    sets = {"bare": [], "alone": bricks[:1], "together": bricks, "turned": bricks[::-1]}
    asked = {name: ask(backbone, plain, plugged, generate=True) for name, plugged in sets.items()}
    return measured(asked, options.bootstrap)


def mixed(options: argparse.Namespace, files: Mapping[str, Path]) -> dict[str, str]:
    """A cartridge of every document alone; then those that are judged again, and the first twice.

    Each is trained among the cartridges of all other documents, as they are by then, and leaves
    what is said of those documents' text as it is. The first had only known those trained alone.

    Returns:
        Document -> its last cartridge.
    """
    single = options.together.replace(", ", "-")
    every = (*DOMAINS, *OTHERS)
    held = {name: f"{name}-{single}" for name in every}
    for name in every:
        study(options, held[name], files, WAYS[options.together])
    for name in (*JUDGED, JUDGED[0]):
        others = [other for other in every if other != name]
        kept = Path(options.work) / f"{name}.kept.txt"
        texts = (files[other].read_text(encoding="utf-8") for other in (*others, "unrelated"))
        kept.write_text("\n\n".join(texts), encoding="utf-8")
        company = f"distractors=[{','.join(held[other] for other in others)}]"
        way = [*WAYS[options.together], company, f"objective.keep={options.mixed_keep}"]
        held[name] += "-mixed"
        study(options, held[name], {**files, "unrelated": kept}, way, options.mixed_steps)
    return held


def several(options: argparse.Namespace, files: Mapping[str, Path]) -> dict[Asked, Any]:
    """Every two of the judged cartridges at once, and all of them -> see `measured`.

    alone, behind   trained alone, one's keys behind the other's: concatenation, the control
    alone           trained alone, at shared positions
    mixed           see `mixed`
    """
    last = mixed(options, files)
    single = {name: f"{name}-{options.together.replace(', ', '-')}" for name in last}
    hows = {
        "alone, one behind the other": (single, "behind"),
        "alone, shared positions": (single, "shared"),
        "among others, shared positions": (last, "shared"),
    }
    sets = [*itertools.permutations(JUDGED, 2)]
    sets += [(one, *(other for other in JUDGED if other != one)) for one in JUDGED]
    found = {}
    for one, *others in sets:
        for how, (held, positions) in hows.items():
            names = [held[name] for name in (one, *others)]
            judged = together(options, names, files[one], positions)
            found[one, " and ".join(others), how] = judged
    return found


def measured(asked: Mapping[str, Any], bootstrap: int) -> dict[str, Any]:
    """Scores of one cartridge alone and beside the other, and what is kept of its gain.

    ``kept`` is (bare − together) / (bare − alone) in nats, ``tokens kept`` the same of the answer
    tokens that are right, ``score kept`` is together / alone in exact match; ``together`` is the
    mean of both orders. Intervals are over questions.
    """
    import numpy as np

    from cfm_train.evaluation.intervals import intervals

    nats = {name: one.nats for name, one in asked.items()}
    exact = {name: one.exact for name, one in asked.items()}
    right = {name: one.right.astype(float) for name, one in asked.items()}
    for held in (nats, exact, right):
        held["together"] = (held["together"] + held.pop("turned")) / 2
    tokens = asked["bare"].tokens
    statistics: dict[str, Any] = {
        **{f"{n}/loss": lambda w, v=v: (w @ v) / (w @ tokens) for n, v in nats.items()},
        **{f"{n}/exact_match": lambda w, v=v: (w @ v) / w.sum(axis=1) for n, v in exact.items()},
        **{f"{n}/token_accuracy": lambda w, v=v: (w @ v) / (w @ tokens) for n, v in right.items()},
        "tokens kept": lambda w: (
            (w @ (right["together"] - right["bare"]))
            / np.maximum(w @ (right["alone"] - right["bare"]), 1e-9)
        ),
        "kept": lambda w: (
            (w @ (nats["bare"] - nats["together"])) / (w @ (nats["bare"] - nats["alone"]))
        ),
        "score kept": lambda w: (w @ exact["together"]) / np.maximum(w @ exact["alone"], 1e-9),
    }
    counts = np.ones(len(tokens), np.int64)
    found = intervals(statistics, counts, bootstrap=bootstrap, seed=0)
    return {name: score.as_dict() for name, score in found.items()}


def arms_table(records: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """The arms of all bricks as Markdown: exact match in percent, nats, gains with intervals."""
    lines = [
        "| document | brick | bare | text | brick | both | brick − bare | both − text | both − "
        "text, nats | ppl × |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (document, way), arms in records.items():
        by_name = {arm["name"]: arm for arm in arms["arms"]}
        four = [by_name[name] for name in ("bare", "text", "brick", "both")]
        shown = [
            f"{100 * arm['exact_match']['value']:.1f} ({arm['loss']['value']:.2f})" for arm in four
        ]
        gains = {gain["arm"]: gain for gain in arms["gains"][:2]}
        shown += [
            f"{100 * g['value']:+.1f} ({100 * g['low']:.1f} to {100 * g['high']:.1f})"
            for g in (gains[arm]["exact_match"] for arm in ("brick", "both"))
        ]
        nats = gains["both"]["loss"]
        shown.append(f"{nats['value']:+.3f} ({nats['low']:.3f} to {nats['high']:.3f})")
        ratio = arms["unrelated"]["perplexity_ratio"]["value"]
        lines.append(f"| {document} | {way} | {' | '.join(shown)} | {ratio:.3f} |")
    return "\n".join(lines)


def together_table(found: Mapping[Asked, Mapping[str, Mapping[str, float]]]) -> str:
    """What is left of each cartridge's score and gain beside others, as Markdown."""
    lines = [
        "| document | beside | trained | exact match, tokens right (nats) bare | alone | together "
        "| kept of exact match | of the gain in tokens right | of the gain in nats |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (document, beside, how), one in found.items():
        shown = [
            f"{100 * one[f'{n}/exact_match']['value']:.1f}, "
            f"{100 * one[f'{n}/token_accuracy']['value']:.1f} ({one[f'{n}/loss']['value']:.2f})"
            for n in ("bare", "alone", "together")
        ]
        shown += [
            f"{one[n]['value']:.2f} [{one[n]['low']:.2f}, {ceiling(one[n]['high'])}]"
            for n in ("score kept", "tokens kept", "kept")
        ]
        lines.append(f"| {document} | {beside} | {how} | {' | '.join(shown)} |")
    return "\n".join(lines)


def ceiling(share: float) -> str:
    """The upper end of a share's interval: without one where some draws hold nothing to keep."""
    return f"{share:.2f}" if share < 1e6 else "–"


def main() -> None:
    """Trains what is missing, measures, prints the tables and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default=None, help="a folder; brick_lm where left out")
    parser.add_argument("--root", required=True, help="folder of DOMAIN.train.txt and .valid.txt")
    parser.add_argument("--work", default="outputs/documents")
    parser.add_argument("--out", default=None, help="a JSON file for the figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--characters", type=int, default=20_000, help="of each document")
    parser.add_argument("--steps", type=int, default=0, help="0 for the recipes' own epochs")
    parser.add_argument(
        "--mixed_steps",
        type=int,
        default=0,
        help="of cartridges among others, which learn more slowly; as --steps where left out",
    )
    parser.add_argument("--mixed_keep", type=float, default=2.0, help="their objective.keep")
    parser.add_argument(
        "--tokens",
        type=int,
        default=64,
        help="of a cartridge; with a passage and "
        "a question behind it no more than the backbone was trained to read",
    )
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--documents", nargs="*", default=list(DOMAINS), choices=list(DOMAINS))
    parser.add_argument(
        "--together",
        default="cartridge, lm",
        choices=["cartridge", "cartridge, lm", "nothing"],
        help="the way of the cartridges that are plugged in several at once",
    )
    parser.add_argument("--more", nargs="*", default=[], help="overrides of every run")
    options = parser.parse_args()
    options.backbone = options.backbone or brick_lm()
    files, records, both = documents(options), {}, {}
    for name in options.documents:
        for way in options.ways:
            called = f"{name}-{way.replace(', ', '-')}"
            records[name, way] = study(options, called, files, WAYS[way])["arms"]
    if options.together != "nothing":
        both = several(options, files)
    print(arms_table(records), "\n")
    if both:
        print(together_table(both))
    if options.out:
        figures = {
            "arms": {" / ".join(key): arms for key, arms in records.items()},
            "together": {" / ".join(key): one for key, one in both.items()},
        }
        Path(options.out).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
