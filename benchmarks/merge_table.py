"""The table that ``merge_tasks.py`` prints: bounds and rules, worst first."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any


def summary(results: Mapping[str, Any], baseline: str) -> dict[str, dict[str, Any]]:
    """One line for each bound and rule that every seed has.

    Args:
        results: by seed ``bounds`` and ``rules``, each with accuracies by task.
        baseline: the rule that all others are compared with.

    Returns:
        By name: ``average`` and ``normalised`` in percent (the mean of accuracy over that of the
        task's own brick), ``tasks``, and the difference to the baseline in points with a 95 %
        interval over tasks (mean over seeds first, Student's t).
    """
    from scipy.stats import t as student

    seeds = list(results)
    rules = [
        rule
        for rule in results[seeds[0]]["rules"]
        if all(rule in results[seed]["rules"] for seed in seeds)
    ]
    lines: dict[str, dict[str, Any]] = {}

    def scores(name: str, seed: str) -> dict[str, float]:
        bounds = results[seed]["bounds"]
        found: dict[str, float] = (
            bounds[name] if name in bounds else results[seed]["rules"][name]["test"]
        )
        return found

    tasks = list(scores("own", seeds[0]))
    for name in ["head alone", *rules, "multitask", "own"]:
        each = {
            task: statistics.fmean(scores(name, seed)[task] for seed in seeds) for task in tasks
        }
        normalised = statistics.fmean(
            scores(name, seed)[task] / scores("own", seed)[task] for seed in seeds for task in tasks
        )
        line: dict[str, Any] = {
            "average": 100 * statistics.fmean(each.values()),
            "normalised": 100 * normalised,
            "tasks": each,
        }
        if baseline in rules and name != baseline:
            differences = [
                100
                * statistics.fmean(
                    scores(name, seed)[task] - scores(baseline, seed)[task] for seed in seeds
                )
                for task in tasks
            ]
            mean = statistics.fmean(differences)
            error = statistics.stdev(differences) / len(differences) ** 0.5
            half = student.ppf(0.975, len(differences) - 1) * error
            line["over_baseline"] = {"mean": mean, "low": mean - half, "high": mean + half}
        if name in rules:
            line["chosen"] = [results[seed]["rules"][name]["parameters"] for seed in seeds]
        lines[name] = line
    return lines


def as_markdown(lines: Mapping[str, Mapping[str, Any]]) -> str:
    """The table for a page, worst first."""
    tasks = list(next(iter(lines.values()))["tasks"])
    head = ["", "average", "normalised", "over task arithmetic", *tasks]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, line in sorted(lines.items(), key=lambda item: item[1]["average"]):
        over = line.get("over_baseline")
        shown = f"{over['mean']:+.1f} [{over['low']:+.1f}, {over['high']:+.1f}]" if over else "–"
        rows.append(
            [
                name,
                f"{line['average']:.1f}",
                f"{line['normalised']:.1f}",
                shown,
                *(f"{100 * line['tasks'][task]:.1f}" for task in tasks),
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
