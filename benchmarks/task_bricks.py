"""Our training against transformers' Trainer with PEFT, on the same machine in the same run.

    python benchmarks/task_bricks.py --root ../shared/data/tasks --seeds 0 1 2 --out results.json

Same backbone (MiniLM), rank, sites, epochs, tokens per batch and learning-rate budget: a sweep of
the same rates for both sides (`--rate` alone, on tasks and a seed of its own), then one rate each.
Arms are interleaved task by task, so that a machine whose speed drifts is fair to all:

    ours        python -m cfm_train, bfloat16 where the processor multiplies it natively
    peer_bf16   Trainer(bf16=True) over a PEFT LoRA
    peer_tuned  the same with bfloat16 weights and batches grouped by length
    peer_fp32   Trainer as it comes

Speed is samples/s of the training loop, from its first step to its last, data and logging
included, start-up and evaluation left out, for every arm alike; scores are accuracies on the
test split. An arm that `--scores` leaves out runs for `--speed-steps` steps, on the first seed
alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ARMS = ("ours", "peer_bf16", "peer_tuned", "peer_fp32")
#: Lower bounds that the project promises: our samples/s over the arm's, geometric mean over tasks.
PROMISED = {"peer_bf16": 1.8, "peer_tuned": 1.0, "peer_fp32": 3.5}


def tasks_of(root: Path) -> list[str]:
    """The tasks of a folder with ``<task>.train.jsonl`` and ``<task>.test.jsonl``, in its order."""
    return list(json.loads((root / "tasks.json").read_text(encoding="utf-8")))


def ours(task: str, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One run of the project, in this process, and its record's figures."""
    from cfm_train.launch.job import prepare

    job = prepare(
        [
            f"recipe=task/{task}",
            f"seed={seed}",
            f"data.root={options.root}",
            f"data.limit={options.rows}",
            "brick=lora",
            f"brick.rank={options.rank}",
            f"brick.learning_rate={options.rate}",
            f"trainer.epochs={options.epochs}",
            f"trainer.tokens_per_batch={options.tokens}",
            "trainer.samples=0",
            "evaluation.bootstrap=1",
            "tracking.mode=disabled",
            f"outputs={folder}",
            f"library={folder}/library",
        ]
    )
    record = job.start()
    return {
        "score": record["metrics"]["test/accuracy"]["value"],
        "samples_per_second": record["cost"]["samples_per_second"],
        "n": record["metrics"]["test/accuracy"]["n"],
    }


def peer(
    arm: str, task: str, seed: int, options: argparse.Namespace, folder: Path, steps: int | None
) -> dict[str, float]:
    """One run of transformers' Trainer with PEFT on the very same rows."""
    import numpy as np
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    from cfm_train.backbone.spec import resolve
    from cfm_train.config.compose import option
    from cfm_train.data.sources import check

    set_seed(seed)
    section = option("data", task, root=str(options.root), limit=options.rows)
    checked = check(section)
    source = resolve(option("backbone", "minilm")).folder
    tokenizer = AutoTokenizer.from_pretrained(source)

    def dataset(split: str) -> Any:
        rows = checked.rows[split]
        texts = list(zip(*[row["text"] for row in rows], strict=True))
        encoded = tokenizer(
            *[list(t) for t in texts], truncation=True, max_length=section["max_length"]
        )
        return Dataset.from_dict({**encoded, "labels": [row["label"] for row in rows]})

    train, test = dataset("train"), dataset("test")
    lengths = [len(ids) for ids in train["input_ids"]]
    batch = max(1, min(64, round(options.tokens / statistics.fmean(lengths))))
    model = AutoModelForSequenceClassification.from_pretrained(
        source,
        num_labels=len(checked.spec.labels or ()),
        dtype=torch.bfloat16 if arm == "peer_tuned" else torch.float32,
    )
    model = get_peft_model(
        model,
        LoraConfig(
            r=options.rank,
            lora_alpha=2 * options.rank,
            target_modules=["query", "value"],
            task_type="SEQ_CLS",
            # By default PEFT leaves the pooler frozen, and this checkpoint has none: it would be
            # noise that nothing learns.
            modules_to_save=["classifier", "pooler"],
        ),
    )

    class Clock(TrainerCallback):
        """From the beginning of the first step to the end of the last."""

        def __init__(self) -> None:
            self.first, self.last = 0.0, 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.first = self.first or time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.last = time.perf_counter()

    clock = Clock()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / f"{arm}-{task}-{seed}"),
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=4 * batch,
            num_train_epochs=options.epochs,
            max_steps=-1 if steps is None else steps,
            learning_rate=options.peer_rate,
            warmup_steps=0.06,
            lr_scheduler_type="linear",
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=arm == "peer_bf16",
            train_sampling_strategy="group_by_length" if arm == "peer_tuned" else "random",
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=train,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[clock],
    )
    trainer.train()
    rows = len(train) * options.epochs if steps is None else steps * batch
    result = {"samples_per_second": rows / (clock.last - clock.first)}
    if steps is None:
        predicted = trainer.predict(test)
        hits = np.argmax(predicted.predictions, -1) == np.asarray(test["labels"])
        result |= {"score": float(hits.mean()), "n": len(test)}
    return result


def runs(
    options: argparse.Namespace, folder: Path, done: set[tuple[str, str, int]]
) -> Iterator[dict[str, Any]]:
    """Every arm on every task and seed, interleaved; what is done already is left out."""
    for seed in options.seeds:
        for task in options.tasks:
            for arm in options.arms:
                short = arm not in options.scores
                if (short and seed != options.seeds[0]) or (arm, task, seed) in done:
                    continue
                if arm == "ours":
                    figures = ours(task, seed, options, folder)
                else:
                    steps = options.speed_steps if short else None
                    figures = peer(arm, task, seed, options, folder, steps)
                yield {"task": task, "seed": seed, "arm": arm, **figures}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the runs show, ours against the peers.

    Returns:
        ``score_difference``: ours minus `peer_bf16` in percentage points, the mean over tasks of
        the means over seeds, its lower 95 % bound (one-sided, Student's t over tasks), and the
        two-sided 95 % interval. ``speed_over_<arm>``:
        geometric mean, median and extremes of the speed ratios of all runs.
    """
    from scipy.stats import t as student_t

    found = {(r["arm"], r["task"], r["seed"]): r for r in rows}
    differences: dict[str, list[float]] = {}
    for (arm, task, seed), r in found.items():
        other = found.get(("peer_bf16", task, seed), {})
        if arm == "ours" and "score" in other:
            differences.setdefault(task, []).append(r["score"] - other["score"])
    result: dict[str, Any] = {}
    if len(differences) > 1:
        # Seeds of one task share its test rows and are no independent draws: the tasks are.
        means = [statistics.fmean(seeds) for seeds in differences.values()]
        mean = statistics.fmean(means)
        error = statistics.stdev(means) / math.sqrt(len(means))
        one, two = (error * float(student_t.ppf(q, df=len(means) - 1)) for q in (0.95, 0.975))
        result["score_difference"] = {
            "mean": 100 * mean,
            "lower_bound": 100 * (mean - one),
            "low": 100 * (mean - two),
            "high": 100 * (mean + two),
            "tasks": len(means),
            "runs": sum(map(len, differences.values())),
            "promised_bound": -1.0,
        }
    for arm, promised in PROMISED.items():
        ratios = [
            found["ours", task, seed]["samples_per_second"] / r["samples_per_second"]
            for (other, task, seed), r in found.items()
            if other == arm and ("ours", task, seed) in found
        ]
        if ratios:
            result[f"speed_over_{arm}"] = {
                "geometric_mean": math.exp(statistics.fmean(map(math.log, ratios))),
                "median": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "runs": len(ratios),
                "promised": promised,
            }
    return result


def main() -> None:
    """Runs the benchmark and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folder of <task>.train.jsonl …")
    parser.add_argument("--tasks", nargs="+", help="some of the tasks in <root>/tasks.json")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--scores", nargs="+", default=["ours", "peer_bf16"], choices=ARMS)
    parser.add_argument("--rows", type=int, default=4000, help="training rows of each task")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=4e-3, help="our learning rate")
    parser.add_argument("--peer-rate", type=float, help="the peers'; ours unless given")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a batch")
    parser.add_argument("--speed-steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark_task_bricks.json"))
    options = parser.parse_args()
    try:
        known = tasks_of(options.root)
    except OSError as error:
        parser.error(f"--root needs a tasks.json that names the tasks ({error})")
    options.tasks = options.tasks or known
    options.peer_rate = options.peer_rate or options.rate
    if unknown := set(options.tasks) - set(known):
        parser.error(f"--tasks: {options.root} has no {', '.join(sorted(unknown))}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    settings = {k: str(v) for k, v in vars(options).items() if k not in ("seeds", "tasks", "out")}
    rows: list[dict[str, Any]] = []
    if options.out.is_file():  # a benchmark that was broken off goes on where it was
        kept = json.loads(options.out.read_text())
        rows = kept["rows"] if kept["options"] == settings else []
    done = {(row["arm"], row["task"], row["seed"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        for row in runs(options, Path(folder), done):
            rows.append(row)
            score = f"{row['score']:.3f}" if "score" in row else "  –  "
            print(
                f"{row['task']:14} seed {row['seed']} {row['arm']:11} score {score} "
                f"{row['samples_per_second']:7.1f} samples/s",
                flush=True,
            )
            told = {"options": settings, "rows": rows, "summary": summary(rows)}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(told, indent=1))
    for name, figures in summary(rows).items():
        print(name, {k: round(v, 3) for k, v in figures.items()})


if __name__ == "__main__":
    main()
