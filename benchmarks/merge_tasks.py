"""Merge rules on the same bricks: the 12 tasks on MiniLM, rule by rule.

    python benchmarks/merge_tasks.py --root ../shared/data/tasks --seeds 0 1 2

For each seed: a LoRA brick for every task, one multi-task brick (the ceiling), heads alone (the
floor), Gram and Fisher statistics. Each rule merges the same bricks; its hyper-parameters are
chosen by the mean accuracy on ``--validation`` rows of each task, then it is scored once on
test rows, with each task's own head. ``weights by gradient`` is task arithmetic with a weight for
each brick and layer, found on the same validation rows from the tuned scale; ``… refitted`` is the
same merge with heads trained anew on it, from each task's training rows. What is done already is
taken from ``--work``: a run that was broken off goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.merge_rules import (
    BASELINE,
    GRADIENT,
    REFITTED,
    RULES,
    SEARCH,
    candidates,
    option_of,
)
from benchmarks.merge_table import as_markdown, summary

#: All of a layer's linear maps: what a brick learns there is what merging has to keep.
SITES = ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down"]


class Bench:
    """One seed: its bricks, tasks and backbone.

    Args:
        seed: of training.
        options: the command line.
    """

    def __init__(self, seed: int, options: argparse.Namespace) -> None:
        self.seed = seed
        self.options = options
        self.folder = options.work / f"seed{seed}"
        self.tasks: list[str] = list(options.tasks)
        self.root = subset(options.root, self.folder / "data", options.rows, options.test)

    def prepare(self) -> None:
        """Trains what is missing, gathers statistics, loads backbone, bricks and data."""
        from cfm_train.bricks.stored import open_brick
        from cfm_train.config.compose import option
        from cfm_train.data.encode import encode, encode_rows
        from cfm_train.data.sources import check
        from cfm_train.data.splits import take
        from cfm_train.library.sidecar import find_sidecars
        from cfm_train.library.store import Library
        from cfm_train.operations.selection import select
        from cfm_train.operations.setting import open_backbone
        from cfm_train.paths import cache_dir

        options = self.options
        self.library = Library(str(self.folder / "library"))
        made = {card.name for card in self.library.cards()}
        for task in self.tasks:
            if task not in made:
                self._run(f"recipe=task/{task}", f"data.root={self.root}", *self._training())
        names = ",".join(self.tasks)
        if "multitask" not in made:
            self._run(
                "recipe=task/multitask",
                f"data.tasks=[{names}]",
                f"data.root={self.root}",
                *self._training(),
                f"brick.learning_rate={options.ceiling_rate}",
                "trainer.accumulate=4",  # a batch is of one task, a step shall be of several
            )
        for kind in ("gram", "fisher"):
            if not all(
                find_sidecars(self.library, self.library.find(task), f"{kind}.safetensors")
                for task in self.tasks
            ):
                self._run(
                    f"recipe=analyze/{kind}",
                    f"bricks=[{names}]",
                    f"data.root={self.root}",
                    f"data.limit={options.statistics}",
                )
        selection = select(
            {"bricks": self.tasks, "library": str(self.folder / "library"), "backbone": None}
        )
        self.selection = selection
        self.backbone, _ = open_backbone(selection.backbone, selection.section)
        tokenizer = self.backbone.tokenizer
        self.bricks = {
            card.name: open_brick(card, self.library, self.backbone)
            for card in selection.cards.values()
        }
        self.ceiling = open_brick(self.library.find("multitask"), self.library, self.backbone)
        self.checked = {
            task: check(
                option("data", task, root=str(self.root)) | {"max_length": options.max_length}
            )
            for task in self.tasks
        }
        self.validation = {
            task: take(checked.rows["validation"], options.validation)
            for task, checked in self.checked.items()
        }
        self.data = {
            task: encode(checked, tokenizer, cache_dir()) for task, checked in self.checked.items()
        }
        self.rows = {
            "validation": {
                task: encode_rows(rows, checked.spec, checked.section, tokenizer, cache_dir())
                for (task, rows), checked in zip(
                    self.validation.items(), self.checked.values(), strict=True
                )
            },
            "test": {task: data.test for task, data in self.data.items()},
        }

    def _training(self) -> list[str]:
        options = self.options
        return [
            f"data.max_length={options.max_length}",
            "brick=lora",
            f"brick.rank={options.rank}",
            f"brick.sites=[{','.join(options.sites)}]",
            f"brick.learning_rate={options.rate}",
            f"trainer.epochs={options.epochs}",
            f"trainer.tokens_per_batch={options.tokens}",
            "trainer.samples=0",
            "evaluation.bootstrap=1",
        ]

    def _run(self, *overrides: str) -> dict[str, Any]:
        from cfm_train.launch.job import prepare

        common = (f"seed={self.seed}", "tracking.mode=disabled", f"outputs={self.folder}")
        return prepare([*overrides, *common, f"library={self.folder}/library"]).start()

    def accuracies(self, plugged: Any, split: str, heads: Mapping[str, Any]) -> dict[str, float]:
        """Accuracy on every task, with the heads given."""
        from cfm_train.evaluation.evaluator import predict

        found = {}
        with folded(self.backbone, plugged):
            for task in self.tasks:
                spec, rows = self.data[task].spec, self.rows[split][task]
                answers = predict(self.backbone, heads[task], spec, rows)
                right = [
                    answers.predictions[i] == answers.references[i] for i in answers.predictions
                ]
                found[task] = statistics.fmean(right)
        return found

    def bounds(self) -> dict[str, dict[str, float]]:
        """Each task's own brick, the multi-task brick, and heads alone, on test rows."""
        own: dict[str, float] = {}
        for task, brick in self.bricks.items():
            everything, self.tasks = self.tasks, [task]
            own |= self.accuracies([brick], "test", {task: brick.head_for(task)})
            self.tasks = everything
        heads = {task: self.ceiling.head_for(task) for task in self.tasks}
        return {
            "own": own,
            "multitask": self.accuracies([self.ceiling], "test", heads),
            "head alone": self.accuracies([], "test", self.new_heads([])),
        }

    def new_heads(self, bricks: Sequence[Any]) -> dict[str, Any]:
        """A head for each task, trained on the bare backbone or on what is folded into it."""
        from cfm_train.evaluation.floor import train_head

        settings = self.selection.cards[next(iter(self.selection.cards))].recipe["trainer"]
        with folded(self.backbone, bricks):
            return {
                task: train_head(self.backbone, self.data[task], settings, seed=self.seed)
                for task in self.tasks
            }

    def row(self, rule: str, known: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the table; ``known`` are those above it."""
        if rule == GRADIENT:
            return self.by_gradient(known[BASELINE]["parameters"]["scale"])
        if not rule.endswith(REFITTED):
            return self.best(rule)
        of = known[rule.removesuffix(REFITTED)]
        weights = of.get("weights")
        merged = self.merged(BASELINE, {"scale": 1.0} if weights else of["parameters"], weights)
        return {
            "parameters": of["parameters"],
            "test": self.accuracies([merged], "test", self.new_heads([merged])),
        }

    def best(self, rule: str) -> dict[str, Any]:
        """A rule at the parameters that are best on validation, scored on test rows."""
        tried = []
        for parameters in candidates(rule):
            merged = self.merged(rule, parameters)
            found = self.accuracies([merged], "validation", merged.heads)
            tried.append((statistics.fmean(found.values()), parameters))
        score, parameters = max(tried, key=lambda one: one[0])
        merged = self.merged(rule, parameters)
        return {
            "parameters": parameters,
            "validation": score,
            "tried": tried,
            "test": self.accuracies([merged], "test", merged.heads),
        }

    def by_gradient(self, scale: float) -> dict[str, Any]:
        """A weight for each brick and layer, by descending the loss on validation rows.

        Args:
            scale: task arithmetic's, tuned on the same rows: every weight starts there.
        """
        from cfm_train.config.merging import complete
        from cfm_train.operations.bench import Bench as Trials
        from cfm_train.operations.found import find
        from cfm_train.operations.sought import Sought
        from cfm_train.tracking.wandb_run import WandbRun

        section = complete(BASELINE, {"scale": 1.0})
        bricks = list(self.bricks.values())
        trials = Trials(
            bricks,
            self.backbone,
            section,
            [scale] * len(bricks),
            sought=Sought(dict(SEARCH), [], self.checked, self.validation),
            labels=list(self.bricks),
            sources=list(self.bricks),
            statistics=None,
            seed=self.seed,
        )
        off = WandbRun("disabled", "merge_tasks", None, "merge", [], {}, self.folder)
        found = find(trials, off, self.folder)
        brick = self.merged(BASELINE, {"scale": 1.0}, found.weights)
        return {
            "parameters": {"start": scale},
            "weights": found.weights,
            "test": self.accuracies([brick], "test", brick.heads),
        }

    def merged(self, rule: str, parameters: Mapping[str, Any], weights: Any = None) -> Any:
        """The merge of all of the seed's bricks; without weights those of the rule."""
        from cfm_train.config.merging import complete
        from cfm_train.merging import engine, sidecars
        from cfm_train.merging.mix import make_mix

        option, given = option_of(rule)
        mix = make_mix(complete(option, {**given, **parameters, "seed": self.seed}))
        trees, cards = self.selection.trees, self.selection.cards
        gathered = None
        if mix.rule.needs:
            found = sidecars.find(mix.rule.needs, trees, cards, self.library)
            gathered = sidecars.read(found, mix.rule.needs)
        return engine.merge(
            list(self.bricks.values()),
            weights,
            mix,
            self.backbone,
            sources=list(map(str, trees)),
            statistics=gathered,
        ).brick


@contextmanager
def folded(backbone: Any, bricks: Sequence[Any]) -> Iterator[None]:
    """Low-rank bricks added onto the weights, exactly taken off again.

    A merge of twelve bricks of rank 8 has rank 96 on every linear map of a layer: plugged in, it
    costs a third more than the backbone alone, on each of some ten thousand rows.
    """
    import torch

    kept = {}
    with torch.no_grad():
        for plug in (plug for brick in bricks for plug in brick.plugs()):
            assert plug.magnitude is None and plug.bias is None, "a plain low-rank update"
            weight = backbone.model.get_submodule(backbone.sites[plug.site].module).weight
            kept.setdefault(plug.site, (weight, weight.clone()))
            weight.add_(plug.scale * (plug.B @ plug.A))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in kept.values():
                weight.copy_(before)


def subset(root: Path, out: Path, rows: int, test: int) -> Path:
    """A folder with the first rows of every file: small tests, and validation rows in proportion.

    Args:
        root: folder of <task>.train.jsonl, <task>.test.jsonl and tasks.json.
        out: where the copies go.
        rows, test: how many of each training and test file.
    """
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(root.glob("*.jsonl")):
        count = test if path.name.endswith(".test.jsonl") else rows
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        (out / path.name).write_text("".join(lines[:count]), encoding="utf-8")
    return out


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folder of <task>.train.jsonl …")
    parser.add_argument("--tasks", nargs="+", help="all of the folder's unless named")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", default=RULES, choices=RULES)
    parser.add_argument("--rows", type=int, default=1000, help="training rows of each task")
    parser.add_argument("--max-length", type=int, default=48, help="tokens of a text")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a batch")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--sites", nargs="+", default=SITES)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--ceiling-rate", type=float, default=1e-3, help="of the multi-task brick")
    parser.add_argument("--statistics", type=int, default=300, help="rows for Gram and Fisher")
    parser.add_argument("--validation", type=int, default=64, help="rows of each task that choose")
    parser.add_argument("--test", type=int, default=300, help="test rows of each task")
    parser.add_argument("--work", type=Path, default=Path("outputs/merge_tasks"))
    options = parser.parse_args()
    if options.tasks is None:
        options.tasks = list(json.loads((options.root / "tasks.json").read_text()))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    results: dict[str, Any] = {}
    for seed in options.seeds:
        out = options.work / f"seed{seed}.json"
        found = json.loads(out.read_text()) if out.is_file() else {"rules": {}}
        results[str(seed)] = found
        if "bounds" in found and set(options.rules) <= found["rules"].keys():
            continue
        bench = Bench(seed, options)
        bench.prepare()
        if "bounds" not in found:
            found["bounds"] = bench.bounds()
        for rule in options.rules:
            if rule not in found["rules"]:
                found["rules"][rule] = bench.row(rule, found["rules"])
                average = statistics.fmean(found["rules"][rule]["test"].values())
                chosen = found["rules"][rule]["parameters"]
                print(f"seed {seed} {rule:32} {100 * average:5.1f} {chosen}", flush=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(found, indent=1))
    lines = summary(results, BASELINE)
    (options.work / "summary.json").write_text(json.dumps(lines, indent=1))
    print(as_markdown(lines))


if __name__ == "__main__":
    main()
