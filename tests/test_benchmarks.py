"""What the benchmarks make of their runs: the peer's against SciPy, the bridge's verdict."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.documents import arms_table, measured, together_table
from benchmarks.domains import share_of, tables
from benchmarks.facts import KINDS, _ways, counterfact, existing, pararel, row_of
from benchmarks.facts import as_markdown as facts_table
from benchmarks.merge_table import as_markdown
from benchmarks.merge_table import summary as rules_of
from benchmarks.stitch_models import LARGE, SMALL, table, verdict
from benchmarks.task_bricks import summary, tasks_of
from cfm_train.knowledge.arms import Answered

#: Scores of ours and of the peer, by task and seed.
SCORES = {
    "a": [(0.90, 0.88), (0.91, 0.90), (0.89, 0.90)],
    "b": [(0.70, 0.75), (0.71, 0.74), (0.69, 0.74)],
    "c": [(0.60, 0.60), (0.64, 0.61)],
}


def rows() -> list[dict[str, object]]:
    made: list[dict[str, object]] = []
    for task, seeds in SCORES.items():
        for seed, pair in enumerate(seeds):
            for arm, score, speed in zip(("ours", "peer_bf16"), pair, (200.0, 100.0), strict=True):
                speed *= 1 + seed if arm == "ours" else 1
                one = {"task": task, "seed": seed, "arm": arm, "score": score}
                made.append({**one, "samples_per_second": speed})
    return made


def test_score_difference_is_an_interval_over_tasks() -> None:
    means = [100 * statistics.fmean(a - b for a, b in seeds) for seeds in SCORES.values()]
    expected = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    found = summary(rows())["score_difference"]
    assert found["mean"] == pytest.approx(statistics.fmean(means))
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    bound = stats.ttest_1samp(means, 0, alternative="greater").confidence_interval(0.95).low
    assert found["lower_bound"] == pytest.approx(bound)
    assert (found["tasks"], found["runs"]) == (3, 8)


def test_one_task_has_no_interval() -> None:
    assert "score_difference" not in summary([row for row in rows() if row["task"] == "a"])


def test_speed_is_the_geometric_mean_of_ratios() -> None:
    found = summary(rows())["speed_over_peer_bf16"]
    assert found["geometric_mean"] == pytest.approx(math.prod([2, 4, 6, 2, 4, 6, 2, 4]) ** (1 / 8))
    assert (found["lowest"], found["highest"], found["runs"]) == (2, 6, 8)


def test_tasks_come_from_the_folder(tmp_path: Path) -> None:
    (tmp_path / "tasks.json").write_text(json.dumps({"b": {}, "a": {}}))
    assert tasks_of(tmp_path) == ["b", "a"]


def joined(validation: float, trained: float, paired: tuple[float, float]) -> dict[str, object]:
    """A result of two models joined, with figures made up."""
    names = {"random bridge": 90.0, "closed form": 16.0, "trained bridge": trained}
    models = {"bottom model": 4.6, "top model": 6.6}
    metrics = {
        f"test/{arm}/{metric}": {"value": value, "low": value - 1, "high": value + 1}
        for arm, value in (names | models).items()
        for metric in ("loss", "perplexity")
    }
    low, high = paired
    for arm in names:
        figure = {"value": (low + high) / 2, "low": low, "high": high}
        metrics |= {f"penalty/{arm}/{metric}": figure for metric in ("loss", "perplexity")}
    return {
        "bottom": LARGE,
        "top": SMALL,
        "point": {"at": "auto"},
        "at": [4, 4],
        "validation": validation,
        "metrics": metrics,
    }


def test_the_verdict_is_of_what_is_best_on_validation() -> None:
    good, wide = joined(1.8, 6.0, (-0.9, -0.3)), joined(1.9, 6.5, (-0.6, 0.2))
    worse = joined(2.2, 15.5, (2.0, 3.0))
    assert list(verdict([worse, good, wide]).values()) == [True, True, True, True]
    assert list(verdict([worse, wide]).values()) == [True, True, True, False]
    assert list(verdict([worse]).values()) == [True, False, False, False]
    marked = [line for line in table([worse, good]).splitlines() if "best on validation" in line]
    assert len(marked) == 1 and "random bridge" in marked[0]


def test_rules_are_held_against_the_baseline_over_tasks() -> None:
    """Means over seeds first, then an interval over tasks; a rule that a seed lacks is out."""

    def seed(shift: float) -> dict[str, object]:
        rules = {
            "base": {"a": 0.5, "b": 0.6, "c": 0.7},
            "better": {"a": 0.6 + shift, "b": 0.7, "c": 0.75},
        }
        bounds = {"own": dict.fromkeys("abc", 0.8), "multitask": rules["base"]}
        return {
            "bounds": {**bounds, "head alone": rules["base"]},
            "rules": {name: {"test": found, "parameters": {}} for name, found in rules.items()},
        }

    results = {"0": seed(0.0), "1": seed(0.02)}
    results["0"]["rules"]["unfinished"] = {}  # type: ignore[index]
    lines = rules_of(results, "base")
    assert set(lines) == {"head alone", "base", "better", "multitask", "own"}
    better = lines["better"]
    assert better["average"] == pytest.approx(100 * (0.61 + 0.7 + 0.75) / 3)
    assert better["normalised"] == pytest.approx(100 * (0.61 + 0.7 + 0.75) / 3 / 0.8)
    expected = stats.ttest_1samp([11, 10, 5], 0).confidence_interval(0.95)
    over = better["over_baseline"]
    assert over["mean"] == pytest.approx(26 / 3)
    assert (over["low"], over["high"]) == pytest.approx((expected.low, expected.high))
    assert "over_baseline" not in lines["base"]
    rows = as_markdown(lines).splitlines()
    assert rows[-1].startswith("| own | 80.0 | 100.0 | ")


def test_what_is_kept_is_a_share_of_the_gain_in_the_mean_of_both_orders() -> None:
    """Sums over questions first: (8 − 4.4) / (8 − 3.5) in nats, 1.5 of 2 right answers, and of
    four tokens (2.5 − 1) / (4 − 1)."""
    arms = {
        "bare": ([6.0, 2.0], [1, 0], [0.0, 0.0]),
        "alone": ([2.0, 1.5], [3, 1], [1.0, 1.0]),
        "together": ([2.5, 1.7], [2, 0], [1.0, 0.0]),
        "turned": ([3.0, 1.6], [2, 1], [1.0, 1.0]),
    }
    asked = {
        name: Answered(np.array(nats), np.array([3, 1]), np.array(right), np.array(exact), [])
        for name, (nats, right, exact) in arms.items()
    }
    found = measured(asked, bootstrap=20)
    assert found["kept"]["value"] == pytest.approx((8 - 4.4) / (8 - 3.5))
    assert found["score kept"]["value"] == pytest.approx(1.5 / 2)
    assert found["tokens kept"]["value"] == pytest.approx(1.5 / 3)
    assert found["together/loss"]["value"] == pytest.approx(4.4 / 4)
    found["kept"] |= {"low": 0.5, "high": 1.0}
    found["score kept"] |= {"low": 0.5, "high": 1.0}
    found["tokens kept"] |= {"low": 0.4, "high": 0.6}
    assert together_table({("law", "news", "alone"): found}).splitlines()[2] == (
        "| law | news | alone | 0.0, 25.0 (2.00) | 100.0, 100.0 (0.88) | 75.0, 62.5 (1.10) | "
        "0.75 [0.50, 1.00] | 0.50 [0.40, 0.60] | 0.80 [0.50, 1.00] |"
    )


def test_a_share_of_a_gain_has_an_interval_over_blocks() -> None:
    bare, found, whole = np.array([4.0, 6.0]), np.array([3.0, 4.0]), np.array([2.0, 2.0])
    share = share_of(bare, found, whole, bootstrap=50)
    assert share == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5, "n": 2})
    one = {"bare": 5.0, "lora": 4.5, "full": 4.0, "rates": {"lora": 5e-3, "full": 1e-3}}
    both = {name: {**one, "share": share} for name in ("law", "medicine")}
    lines = tables({"domains": both, "together": {"sum": dict.fromkeys(both, share)}})
    assert "| law | 5.000 | 4.500 (rate 0.005) | 4.000 (rate 0.001) | 0.50 [0.50, 0.50] |" in lines
    assert lines.splitlines()[-1] == "| sum | 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] |"


def test_the_table_of_arms_has_gains_with_intervals() -> None:
    def figure(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1}

    arms = {
        "arms": [
            {"name": name, "exact_match": figure(score), "loss": figure(4 - score)}
            for name, score in {"bare": 0.1, "text": 0.5, "brick": 0.3, "both": 0.55}.items()
        ],
        "gains": [
            {"arm": "brick", "over": "bare", "exact_match": figure(0.2), "loss": figure(-0.2)},
            {"arm": "both", "over": "text", "exact_match": figure(0.05), "loss": figure(-0.05)},
            {"arm": "brick", "over": "text", "exact_match": figure(-0.2), "loss": figure(0.2)},
        ],
        "unrelated": {"perplexity_ratio": figure(1.01)},
    }
    row = arms_table({("law", "LoRA"): arms}).splitlines()[2]
    assert row == (
        "| law | LoRA | 10.0 (3.90) | 50.0 (3.50) | 30.0 (3.70) | 55.0 (3.45) | "
        "+20.0 (10.0 to 30.0) | +5.0 (-5.0 to 15.0) | -0.050 (-0.150 to 0.050) | 1.010 |"
    )


def test_facts_with_patterns_held_out(shared: Path) -> None:
    """What is judged is never taught; every prompt names its subject and ends before the answer."""
    facts = pararel(shared / "data" / "facts" / "pararel.jsonl", 60)
    assert len({fact["subject"] for fact in facts}) == 60 and facts == pararel(
        shared / "data" / "facts" / "pararel.jsonl", 60
    )
    for fact in facts:
        learned = {fact["prompt"], *fact["paraphrases"]}
        assert fact["held_out"] and not learned & {*fact["held_out"], *fact["others"]}
        assert all("[" not in text for text in learned)
    told = counterfact(shared / "data" / "facts" / "counterfact.jsonl", 5)
    assert [fact["answer"] for fact in told][:2] == ["English", "Islam"]
    assert not any(fact["paraphrases"] for fact in told)
    own = counterfact(shared / "data" / "facts" / "counterfact.jsonl", 200)
    assert [fact["subject"] for fact in own if not fact["held_out"]] == ["Haseeb Ahsan"]
    assert _ways(["[X] is in [Y] .", "[Y] has [X]", "[X] is in [Y]."]) == ["[X] is in"]


def test_a_paraphrase_that_is_taught_is_in_the_words_of_the_relation(shared: Path) -> None:
    """Nothing else is another than in the plain set, and what is held out stays so."""
    path = shared / "data" / "facts" / "counterfact.jsonl"
    plain, told = counterfact(path, 200), counterfact(path, 200, paraphrased=True)
    assert [{**fact, "paraphrases": []} for fact in told] == plain
    assert told[0]["paraphrases"] == ["Danielle Darrieux is a native speaker of"]
    assert sum(len(fact["paraphrases"]) == 1 for fact in told) >= 195
    for fact in told:
        for prompt in fact["paraphrases"]:
            assert fact["subject"] in prompt and prompt != fact["prompt"]
            assert not any(text.endswith(prompt) for text in fact["held_out"])


def test_kinds_that_are_not_there_are_left_out_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(KINDS, "new", ["no_such_brick"])
    assert existing(["new", "rows"]) == ["rows"]
    assert capsys.readouterr().out == (
        "left out: new (there is no conf/brick/no_such_brick.yaml)\n"
    )


def test_the_table_of_facts_shows_what_a_record_has() -> None:
    figure = {"value": 0.97, "low": 0.9, "high": 1.0, "n": 200}
    metrics = {
        "prompt/brick/exact_match": figure,
        "bytes_per_fact": {**figure, "value": 16416.0},
        "unrelated/perplexity_ratio": {**figure, "value": 1.002},
    }
    record = {"metrics": metrics, "checks": {"unplugged equals bare": {"passed": True}}}
    less = {"checks": {"the others' answers are as they were": {"passed": False}}}
    row = row_of("pararel", "neurons", record, less)
    line = facts_table([row]).splitlines()[-1]
    assert line.startswith("| ParaRel | neurons | 200 | 97.0 | – |")
    assert "| × 1.002 | 16,416 |" in line
    assert line.endswith("| equal | NOT EQUAL |") and row["checks"] is False
