"""Facts of ParaRel and CounterFact, taught by each kind of brick, in one table.

    python -m benchmarks.facts ../shared/data/facts --backbone DIR --unrelated FILE.txt

ParaRel's ways to ask for a relation are split: the first ones are taught, the last one or two are
held out; another relation of the subject is asked in the words of some other relation, and a
neighbour is another subject of the same relation. CounterFact brings its own paraphrase (asked
only, never taught) and neighbour; its answers are wrong on purpose, so no backbone knows them.
Targets: ≥ 95 % exact on taught prompts, ≥ 70 % on held-out patterns, ≤ 5 % of other relations with
the taught answer, ≥ 95 % of neighbours unchanged, perplexity within 1 %.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

KINDS = {
    "neurons": ["brick=neurons"],
    "rows": ["brick=rows"],
    "neurons, no gate": ["brick=neurons", "gate.kind=none"],
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


def counterfact(path: Path, count: int) -> list[dict[str, Any]]:
    """The first facts, each subject once; the paraphrase is held out."""
    facts: dict[str, dict[str, Any]] = {}
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        if len(facts) < count and row["subject"] not in facts:
            facts[row["subject"]] = {
                "subject": row["subject"],
                "prompt": row["prompt"],
                "answer": row["target_new"],
                "held_out": [row["rephrase_prompt"]],
                "neighbours": [{"prompt": row["locality_prompt"]}],
            }
    return list(facts.values())


def arms(
    options: argparse.Namespace, sets: dict[str, list[dict[str, Any]]]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Runs every kind on every set, and gives its record."""
    options.out.mkdir(parents=True, exist_ok=True)
    for name, facts in sets.items():
        file = options.out / f"{name}.jsonl"
        file.write_text("".join(json.dumps(fact) + "\n" for fact in facts), "utf-8")
        for kind in options.kinds or KINDS:
            command = [
                sys.executable, "-m", "cfm_train", "recipe=knowledge/facts", *KINDS[kind],
                f"name={name}-{kind.replace(', ', '-').replace(' ', '-')}",
                f"backbone.path={options.backbone}", f"data.facts={file}",
                f"data.unrelated={options.unrelated}", f"outputs={options.out}",
                f"library={options.out / 'library'}", "tracking=disabled", *options.overrides,
            ]  # fmt: skip
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            record = done.stdout.splitlines()[-1].removeprefix("record: ")
            yield name, kind, json.loads(Path(record).read_text("utf-8"))


def row_of(name: str, kind: str, record: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: the figures that a record has."""
    metrics = record["metrics"]
    found = {column: metrics[key]["value"] for column, key in COLUMNS.items() if key in metrics}
    passed = all(check["passed"] for check in record["checks"].values())
    return {"facts": name, "kind": kind, "n": metrics["bytes_per_fact"]["n"], **found,
            "checks": passed}  # fmt: skip


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table; shares in per cent."""
    lines = [
        "| facts | kind | n | " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---:|" * (len(COLUMNS) + 1),
    ]
    for row in rows:
        cells = [row["facts"], row["kind"], str(row["n"])]
        cells += [_cell(column, row.get(column)) for column in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "–"
    if column == "perplexity":
        return f"× {value:.4g}"
    if column == "bytes":
        return f"{value:,.0f}"
    return f"{value:.2f}" if column == "seconds" else f"{100 * value:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the arms and prints the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with pararel.jsonl and counterfact.jsonl")
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--unrelated", required=True, type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--sets", nargs="*", default=["pararel", "counterfact"])
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS))
    parser.add_argument("--out", type=Path, default=Path("outputs/facts"))
    parser.add_argument("overrides", nargs="*", default=[])
    options = parser.parse_intermixed_args(arguments)
    makers = {"pararel": pararel, "counterfact": counterfact}
    sets = {
        name: makers[name](options.data / f"{name}.jsonl", options.count) for name in options.sets
    }
    rows = []
    for name, kind, record in arms(options, sets):
        rows.append(row_of(name, kind, record))
        (options.out / "table.json").write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
        print(as_markdown(rows), flush=True)


if __name__ == "__main__":
    main()
