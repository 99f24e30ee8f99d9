"""Facts of ParaRel and CounterFact, taught by each kind of brick, in one table.

    python -m benchmarks.facts ../shared/data/facts --unrelated FILE.txt

ParaRel's ways to ask for a relation are split: the first ones are taught, the last one or two are
held out; another relation of the subject is asked in the words of some other relation, and a
neighbour is another subject of the same relation. CounterFact brings its own paraphrase (asked
only, never taught) and neighbour; its answers are wrong on purpose, so no backbone knows them. In
its second set one more prompt is taught: the words in which CounterFact asks the neighbour.
Of every brick one fact is forgotten, too, and the others held against what they were.
Targets: ≥ 95 % exact on taught prompts, ≥ 70 % on held-out patterns, ≤ 5 % of other relations with
the taught answer, ≥ 95 % of neighbours unchanged, perplexity within 1 %.

The same command again goes on where it stopped: runs that are done are found in ``--out``.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.carried import brick_lm
from cfm_train.config.catalogue import groups
from cfm_train.data.facts import normalised

#: Kind -> the brick of ``conf/brick``, and what else is set.
KINDS = {
    "neurons": ["neurons"],
    "lora_facts": ["lora_facts"],
    "cartridge_facts": ["cartridge_facts"],
    "rows": ["rows"],
    "encoded_rows": ["encoded_rows"],
    "map": ["map"],
    "neurons, no gate": ["neurons", "gate.kind=none"],
}
#: Set -> its title in the table.
SETS = {
    "pararel": "ParaRel",
    "counterfact": "CounterFact",
    "counterfact-paraphrased": "CounterFact, one paraphrase taught",
}
#: Column -> the record's figure.
COLUMNS = {
    "taught": "prompt/brick/exact_match",
    "paraphrases": "paraphrases/brick/exact_match",
    "held out": "held_out/brick/exact_match",
    "held out, text": "held_out/text/says_answer",
    "held out, both": "held_out/both/says_answer",
    "others": "others/brick/says the taught answer",
    "others, bare": "others/bare/says the taught answer",
    "neighbours": "neighbours/argmax unchanged",
    "perplexity": "unrelated/perplexity_ratio",
    "bytes": "bytes_per_fact",
    "seconds": "seconds_per_fact",
}
#: Column -> the check: of the run that taught, and of the run that forgot one fact.
CHECKS = {"unplugged": "unplugged equals bare"}
FORGOTTEN = {"others after deleting one": "the others' answers are as they were"}


def pararel(path: Path, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Facts of relations that can be asked for in three ways or more, the answer at the end."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    generator = random.Random(seed)
    ways = {row["relation"]: _ways(row["patterns"]) for row in rows}
    ways = {relation: found for relation, found in ways.items() if len(found) >= 3}
    subjects: dict[str, list[dict[str, Any]]] = {}
    chosen, seen = [], set()
    for row in generator.sample(rows, len(rows)):
        if row["relation"] in ways and row["subject"] not in seen:
            seen.add(row["subject"])
            subjects.setdefault(row["relation"], []).append(row)
            chosen.append(row)
    chosen = chosen[:count]
    taken = {row["subject"] for row in chosen}
    facts = []
    for row in chosen:
        relation, subject = row["relation"], row["subject"]
        asked = [way.replace("[X]", subject) for way in ways[relation]]
        held = 1 if len(asked) < 4 else 2
        strange = [r for r in ways if not set(ways[r]) & set(ways[relation])]
        other = ways[generator.choice(strange)][0].replace("[X]", subject)
        near = [r["subject"] for r in subjects[relation] if r["subject"] not in taken]
        neighbour = ways[relation][0].replace("[X]", near[0]) if near else None
        facts.append(
            {
                "subject": subject,
                "prompt": asked[0],
                "answer": row["object"],
                "paraphrases": asked[1:-held],
                "held_out": asked[-held:],
                "others": [other],
                "neighbours": [{"prompt": neighbour}] if neighbour else [],
            }
        )
    return facts


def _ways(patterns: Sequence[str]) -> list[str]:
    """The patterns that end in the answer, without it."""
    ends = [one.rstrip(" .") for one in patterns]
    return list(
        dict.fromkeys(one[:-3].rstrip() for one in ends if one.endswith("[Y]") and "[X]" in one)
    )


def counterfact(path: Path, count: int, *, paraphrased: bool = False) -> list[dict[str, Any]]:
    """The first facts, each subject once; CounterFact's paraphrase is held out.

    Args:
        path: the file.
        count: how many.
        paraphrased: teach one more prompt, see `_in_other_words`.
    """
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    more = _in_other_words(rows) if paraphrased else {}
    facts: dict[str, dict[str, Any]] = {}
    for at, row in enumerate(rows):
        if len(facts) < count and row["subject"] not in facts:
            taught = {normalised(text) for text in (row["prompt"], *more.get(at, []))}
            asked = row["rephrase_prompt"]
            facts[row["subject"]] = {
                "subject": row["subject"],
                "prompt": row["prompt"],
                "answer": row["target_new"],
                "paraphrases": more.get(at, []),
                # A few paraphrases are the prompt itself.
                "held_out": [] if normalised(asked) in taught else [asked],
                "neighbours": [{"prompt": row["locality_prompt"]}],
            }
    return list(facts.values())


def _in_other_words(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[str]]:
    """Another prompt for the facts of rows: one of the same relation's, none that is held out.

    A row's neighbour is another subject of its relation, so the neighbour's words fit the row's
    subject. Where they are the row's own, those of other rows that are worded like it stand in,
    the most frequent first.
    """
    own = [row["prompt"].replace(row["subject"], "[X]") for row in rows]
    ways = sorted(set(own), key=lambda way: (-len(way), way))
    near = [_way_of(row["locality_prompt"], ways) for row in rows]
    linked: dict[str, Counter[str]] = {}
    for way, other in zip(own, near, strict=True):
        if other is not None:
            linked.setdefault(way, Counter())[other] += 1
    found = {}
    for at, row in enumerate(rows):
        candidates = [near[at], *(way for way, _ in linked.get(own[at], Counter()).most_common())]
        fitting = [way.replace("[X]", row["subject"]) for way in candidates if way is not None]
        found[at] = [
            prompt
            for prompt in fitting
            if prompt != row["prompt"] and not row["rephrase_prompt"].endswith(prompt)
        ][:1]
    return found


def _way_of(prompt: str, ways: Sequence[str]) -> str | None:
    """The longest pattern that a prompt may come from; None for none."""
    for way in ways:
        head, _, tail = way.partition("[X]")
        if (
            len(prompt) > len(head) + len(tail)
            and prompt.startswith(head)
            and prompt.endswith(tail)
        ):
            return way
    return None


def existing(kinds: Sequence[str]) -> list[str]:
    """The kinds whose brick is in ``conf/brick``; says which are not."""
    bricks = groups()["brick"]
    for kind in kinds:
        if KINDS[kind][0] not in bricks:
            print(f"left out: {kind} (there is no conf/brick/{KINDS[kind][0]}.yaml)", flush=True)
    return [kind for kind in kinds if KINDS[kind][0] in bricks]


def arms(
    options: argparse.Namespace, sets: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Runs every kind on every set; gives the records of teaching and of forgetting one fact."""
    options.out.mkdir(parents=True, exist_ok=True)
    kinds = existing(options.kinds or list(KINDS))
    shared = [
        f"outputs={options.out}", f"library={options.out / 'library'}", "tracking=disabled",
    ]  # fmt: skip
    for name, facts in sets.items():
        file = options.out / f"{name}.jsonl"
        file.write_text("".join(json.dumps(fact) + "\n" for fact in facts), "utf-8")
        for kind in kinds:
            brick, *more = KINDS[kind]
            told = f"{name}-{kind.replace(', ', '-').replace(' ', '-')}"
            record = _run(
                "recipe=knowledge/facts", f"brick={brick}", *more, f"name={told}",
                "backbone=hf", f"backbone.path={options.backbone}", f"data.facts={file}",
                f"data.unrelated={options.unrelated}", *shared, *options.overrides,
            )  # fmt: skip
            taught = record["brick"]
            less = _run(
                "recipe=knowledge/forget", f"name={told}-less",
                f"bricks=[{taught['name']}@{taught['version']}]", "facts=[0]", *shared,
            )  # fmt: skip
            yield name, kind, record, less


def _run(*arguments: str) -> dict[str, Any]:
    """The record of a run, which may have been done before.

    Raises:
        RuntimeError: the run failed; with what it said.
    """
    command = [sys.executable, "-m", "cfm_train", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}")
    record = done.stdout.splitlines()[-1].removeprefix("record: ")
    return json.loads(Path(record).read_text("utf-8"))  # type: ignore[no-any-return]


def row_of(
    name: str, kind: str, record: Mapping[str, Any], less: Mapping[str, Any]
) -> dict[str, Any]:
    """A row of the table: the figures that a record has, and whether what must hold does.

    Args:
        name: of the set.
        kind: of brick.
        record: of the run that taught.
        less: of the run that forgot one fact.
    """
    metrics = record["metrics"]
    found = {column: metrics[key]["value"] for column, key in COLUMNS.items() if key in metrics}
    for columns, checks in ((CHECKS, record["checks"]), (FORGOTTEN, less["checks"])):
        found |= {c: checks[key]["passed"] for c, key in columns.items() if key in checks}
    all_checks = [*record["checks"].values(), *less["checks"].values()]
    passed = all(check["passed"] for check in all_checks)
    return {"facts": SETS.get(name, name), "kind": kind, "n": metrics["bytes_per_fact"]["n"],
            **found, "checks": passed}  # fmt: skip


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table; shares in per cent."""
    columns = [*COLUMNS, *CHECKS, *FORGOTTEN]
    lines = [
        "| facts | kind | n | " + " | ".join(columns) + " |",
        "|---|---|" + "---:|" * (len(columns) + 1),
    ]
    for row in rows:
        cells = [row["facts"], row["kind"], str(row["n"])]
        cells += [_cell(column, row.get(column)) for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(column: str, value: float | bool | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "equal" if value else "NOT EQUAL"
    if column == "perplexity":
        return f"× {value:.4g}"
    if column == "bytes":
        return f"{value:,.0f}"
    return f"{value:.2f}" if column == "seconds" else f"{100 * value:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the arms and prints the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with pararel.jsonl and counterfact.jsonl")
    parser.add_argument("--backbone", default=None, help="a folder; brick_lm where left out")
    parser.add_argument("--unrelated", required=True, type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--sets", nargs="*", choices=list(SETS), default=list(SETS))
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS))
    parser.add_argument("--out", type=Path, default=Path("outputs/facts"))
    parser.add_argument("overrides", nargs="*", default=[])
    options = parser.parse_intermixed_args(arguments)
    options.backbone = options.backbone or brick_lm()
    counter = options.data / "counterfact.jsonl"
    makers = {
        "pararel": lambda: pararel(options.data / "pararel.jsonl", options.count),
        "counterfact": lambda: counterfact(counter, options.count),
        "counterfact-paraphrased": lambda: counterfact(counter, options.count, paraphrased=True),
    }
    rows = []
    for name, kind, record, less in arms(options, {name: makers[name]() for name in options.sets}):
        rows.append(row_of(name, kind, record, less))
        (options.out / "table.json").write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
        print(as_markdown(rows), flush=True)


if __name__ == "__main__":
    main()
