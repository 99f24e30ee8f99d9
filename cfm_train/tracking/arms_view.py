"""Arms of knowledge bricks as the page and the terminal show them: text, brick, both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]

#: What each arm is, in words.
WORDS = {
    "bare": "bare backbone",
    "text": "text in the prompt",
    "brick": "brick",
    "both": "text and brick",
    "among others": "brick among other cartridges",
}
METRICS = ("loss", "token_accuracy", "exact_match")


def arms(records: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[Json]:
    """One entry for each record with arms.

    Args:
        records: valid records.
        labels: of the runs.

    Returns:
        The questions, the metrics that were taken, each arm's and each gain's figures by metric
        with ``clear`` where a gain's interval leaves out zero, and the cost on unrelated text.
    """
    return [_arms(at, r["arms"], labels[at]) for at, r in enumerate(records) if "arms" in r]


def _arms(at: int, found: Mapping[str, Any], label: str) -> Json:
    metrics = [metric for metric in METRICS if metric in found["arms"][0]]
    return {
        "run": at,
        "label": label,
        **{key: found[key] for key in ("questions", "made", "cut", "unrelated")},
        "metrics": metrics,
        "arms": [
            {"name": WORDS[arm["name"]], "figures": [arm[metric] for metric in metrics]}
            for arm in found["arms"]
        ],
        "gains": [
            {
                "name": f"{WORDS[gain['arm']]} − {WORDS[gain['over']]}",
                "figures": [
                    {**gain[metric], "clear": gain[metric]["low"] > 0 or gain[metric]["high"] < 0}
                    for metric in metrics
                ],
            }
            for gain in found["gains"]
        ],
    }
