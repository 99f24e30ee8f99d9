"""What the dashboard decides to show, without a browser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from demo_records import (
    FINGERPRINT,
    TASKS,
    averaged,
    cell,
    compared,
    figure,
    quickstart,
    trained,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cfm_train.tracking.lineage_view import lineage
from cfm_train.tracking.record import Record, new_record
from cfm_train.tracking.view import thin, view


def bare(name: str, *cells: dict, seed: int = 0, **other: object) -> Record:
    """A record with nothing but a matrix."""
    known = {"operation": "train", "recipe": "r", "config_hash": f"{name}{seed}hash", **other}
    return new_record(**known, name=name, seed=seed, matrix=list(cells))


def rows(shown: dict) -> dict[str, list]:
    """label -> values, None where nothing was measured."""
    return {
        row["label"]: [c and c["value"] for c in row["cells"]] for row in shown["matrix"]["rows"]
    }


def test_matrix_keeps_every_cell_and_orders_roles(tmp_path: Path) -> None:
    shown = view(quickstart(tmp_path), tmp_path)
    assert [task["task"] for task in shown["matrix"]["tasks"]] == list(TASKS)
    assert list(rows(shown)) == [
        *TASKS,
        "average(sentiment, topic)",
        "multitask",
        "frozen backbone",
    ]
    assert rows(shown)["frozen backbone"] == [floor for _, floor in TASKS.values()]
    assert rows(shown)["topic"] == [TASKS["sentiment"][1] - 0.03, 0.88, TASKS["intent"][1] - 0.03]
    assert shown["matrix"]["best"] == [0, 1, 2]


def test_runs_of_one_name_that_disagree_get_rows_of_their_own() -> None:
    seeds = [bare("sst2", cell("sst2", "sst2", 0.8 + s / 100, "brick"), seed=s) for s in (1, 2, 3)]
    assert list(rows(view(seeds, Path()))) == ["sst2 · seed 1", "sst2 · seed 2", "sst2 · seed 3"]
    settings_differ = [
        new_record(
            operation="train", recipe="r", name="sst2", seed=0, config_hash=h * 64,
            matrix=[cell("sst2", "sst2", v, "brick")],
        )
        for h, v in (("a", 0.8), ("b", 0.9))
    ]  # fmt: skip
    assert rows(view(settings_differ, Path())) == {"sst2 · aaaaaa": [0.8], "sst2 · bbbbbb": [0.9]}


def seeded(name: str, family: str, values: dict[int, float], **other: object) -> list[Record]:
    """Runs that differ by their seed alone."""
    return [
        bare(
            name,
            cell(name, "t", value, "brick"),
            cell("frozen", "t", 0.5, "floor"),
            seed=seed,
            brick={"name": name, "version": f"{seed}{family}", "path": ".", "parents": []},
            seedless_hash=family * 16,
            **other,
        )
        for seed, value in values.items()
    ]


def test_the_mean_of_the_seeds_competes_and_no_single_seed_does() -> None:
    """One lucky seed of b beats all of a, and a wins: its mean is higher."""
    a, b = {1: 0.80, 2: 0.81, 3: 0.82}, {1: 0.70, 2: 0.90, 3: 0.71}
    shown = view([*seeded("a", "a1b2", a), *seeded("b", "c3d4", b)], Path())
    assert list(rows(shown)) == [
        "a · mean of 3 seeds", "a · seed 1", "a · seed 2", "a · seed 3",
        "b · mean of 3 seeds", "b · seed 1", "b · seed 2", "b · seed 3", "frozen",
    ]  # fmt: skip
    table = shown["matrix"]["rows"]
    assert [row["members"] for row in table if "members" in row] == [[1, 2, 3], [5, 6, 7]]
    for at, values in ((0, a), (4, b)):
        mean = stats.ttest_1samp(list(values.values()), 0.0).confidence_interval(0.95)
        found = table[at]["cells"][0]
        assert found["value"] == pytest.approx(np.mean(list(values.values())))
        assert (found["low"], found["high"]) == pytest.approx((mean.low, mean.high))
        assert found["n"] == 3
    assert shown["matrix"]["best"] == [0]
    head = shown["headline"]
    assert (head["label"], head["of"], head["seeds"]) == ("a · mean of 3 seeds", 2, 3)
    assert head["figure"] == table[0]["cells"][0] and head["run"] is None
    assert [point["row"] for point in shown["costs"]] == [1, 2, 3, 5, 6, 7], "each at its own cost"


def test_the_mean_of_seeds_says_what_is_said_of_a_seed() -> None:
    records = seeded("a", "a1b2", {1: 0.80, 2: 0.81})
    for record in records:
        record["matrix"][0]["note"] = "adapts on test inputs"
    table = view([*records, *seeded("b", "c3d4", {1: 0.7, 2: 0.9})], Path())["matrix"]["rows"]
    assert [row["label"] for row in table if "note" in row] == [
        "a · mean of 2 seeds", "a · seed 1", "a · seed 2",
    ]  # fmt: skip
    assert {row["note"] for row in table if "note" in row} == {"adapts on test inputs"}


def test_settings_of_one_name_are_grouped_apart() -> None:
    records = [*seeded("a", "a1b2", {1: 0.6, 2: 0.7}), *seeded("a", "c3d4", {1: 0.8, 2: 0.9})]
    records = [records[at] for at in (0, 2, 1, 3)]  # as a sweep over both has them
    shown = view(records, Path())
    assert [label.split(" · ")[1:] for label in rows(shown) if label != "frozen"] == [
        [family, what]
        for family in ("a1b2a1", "c3d4c3")
        for what in ("mean of 2 seeds", "seed 1", "seed 2")
    ]
    assert {k: v[0] for k, v in rows(shown).items() if "mean" in k} == pytest.approx(
        {"a · a1b2a1 · mean of 2 seeds": 0.65, "a · c3d4c3 · mean of 2 seeds": 0.85}
    )
    assert shown["headline"]["label"] == "a · c3d4c3 · mean of 2 seeds"
    assert [run["label"] for run in shown["runs"]][2] == "a · a1b2a1 · seed 2"


def test_what_is_no_group_of_seeds() -> None:
    """One seed, other settings, a second reading of the same brick, unknown settings."""
    alone = seeded("a", "a1b2", {1: 0.6}) + seeded("b", "c3d4", {2: 0.7})
    assert list(rows(view(alone, Path()))) == ["a", "b", "frozen"]
    read = seeded("a", "a1b2", {1: 0.6, 2: 0.6}, operation="evaluate")
    assert list(rows(view(read, Path()))) == ["a", "frozen"]
    old = seeded("a", "a1b2", {1: 0.6, 2: 0.7})
    for record in old:
        del record["seedless_hash"]
    assert list(rows(view(old, Path()))) == ["a · seed 1", "a · seed 2", "frozen"]
    same = seeded("a", "a1b2", {1: 0.6, 2: 0.6})
    assert list(rows(view(same, Path()))) == ["a · mean of 2 seeds", "a · seed 1", "a · seed 2",
                                              "frozen"]  # fmt: skip


def test_the_mean_over_tasks_of_a_group_is_that_of_its_seeds() -> None:
    """Each seed's mean of the tasks first: the tasks of one seed are not independent."""
    records, values = seeded("a", "a1b2", {1: 0.6, 2: 0.7, 3: 0.65}), (0.5, 0.4, 0.6)
    for record, value in zip(records, values, strict=True):
        record["matrix"].append(cell("a", "u", value, "brick"))  # type: ignore[arg-type]
    shown = view(records, Path())
    means = [(x + y) / 2 for x, y in zip((0.6, 0.7, 0.65), values, strict=True)]
    expected = stats.ttest_1samp(means, 0.0).confidence_interval(0.95)
    mean = shown["matrix"]["rows"][0]["mean"]
    assert (mean["low"], mean["high"]) == pytest.approx((expected.low, expected.high))
    assert shown["headline"]["figure"] == mean


def test_the_same_figure_from_two_runs_is_one_cell() -> None:
    train = bare("mine", cell("mine", "sst2", 0.8, "brick"))
    evaluate = bare("check", cell("mine", "sst2", 0.8, "brick"), cell("mine", "trec", 0.5, "brick"))
    assert rows(view([train, evaluate], Path())) == {"mine": [0.8, 0.5]}


def test_the_strictest_bound_stands() -> None:
    floors = [bare(str(v), cell("frozen", "t", v, "floor")) for v in (0.6, 0.7, 0.65)]
    assert rows(view(floors, Path())) == {"frozen": [0.7]}
    floors = [bare(str(v), cell("frozen", "t", v, "floor", "loss")) for v in (0.6, 0.7, 0.65)]
    assert rows(view(floors, Path())) == {"frozen": [0.6]}


def test_headline_is_the_best_over_most_tasks_and_says_what_made_it(tmp_path: Path) -> None:
    records = quickstart(tmp_path)
    headline = view(records, tmp_path)["headline"]
    assert (headline["kind"], headline["label"], headline["of"]) == (
        "one", "average(sentiment, topic)", 4,
    )  # fmt: skip
    assert headline["figure"]["value"] == pytest.approx((0.885 + 0.861 + 0.835) / 3)
    assert headline["floor"]["value"] == pytest.approx(np.mean([f for _, f in TASKS.values()]))
    assert headline["ceiling"]["value"] == pytest.approx(
        np.mean([v - 0.01 for v, _ in TASKS.values()])
    )
    assert headline["run"] == 3


def test_headline_of_bricks_that_stand_on_one_task_each(tmp_path: Path) -> None:
    headline = view([trained(tmp_path, task) for task in TASKS], tmp_path)["headline"]
    assert headline["kind"] == "each"
    found = [(entry["label"], entry["figure"]["value"]) for entry in headline["winners"]]
    assert found == [(task, value) for task, (value, _) in TASKS.items()]
    assert [entry["floor"]["value"] for entry in headline["winners"]] == [
        floor for _, floor in TASKS.values()
    ]


def test_a_merged_brick_is_held_against_the_best_brick_of_each_task_and_finds_its_maker() -> None:
    def maker(name: str, operation: str, *cells: dict) -> Record:
        brick = {"name": name, "version": "1", "path": ".", "parents": []}
        record = bare(name, *cells, brick=brick)
        record["operation"] = operation
        return record

    values = {"a": (0.9, 0.5), "b": (0.6, 0.8), "ab": (0.85, 0.75)}
    compared = bare(
        "table",
        *(
            cell(name, task, value, "merged" if name == "ab" else "brick")
            for name, pair in values.items()
            for task, value in zip("xy", pair, strict=True)
        ),
    )
    records = [maker("a", "train"), maker("b", "train"), maker("ab", "merge"), compared]
    shown = view(records, Path())
    assert shown["headline"]["label"] == "ab"
    assert shown["headline"]["ceiling"]["value"] == pytest.approx((0.9 + 0.8) / 2)
    assert shown["headline"]["run"] == 2
    assert [point["run"] for point in shown["costs"]] == [0, 1, 2]
    again = [*records, maker("ab", "merge")]  # two runs may have made it: neither is named
    assert view(again, Path())["headline"]["run"] is None


def test_tasks_with_scores_and_losses_have_no_common_winner() -> None:
    cells = [cell("a", "x", 0.9, "brick"), cell("a", "y", 0.2, "brick", "loss")]
    assert view([bare("r", *cells)], Path())["headline"]["kind"] == "each"


def test_the_checks_of_a_sequence_are_those_of_its_steps(tmp_path: Path) -> None:
    step = trained(tmp_path, "topic")
    check = {"value": True, "tolerance": None, "passed": True}
    whole = new_record(
        operation="sequence", recipe="quickstart", name="quickstart", seed=0, config_hash="s",
        checks={"topic: backbone unchanged": check},
    )  # fmt: skip
    assert [c["name"] for c in view([whole, step], tmp_path)["checks"]] == ["backbone unchanged"]
    assert len(view([whole], tmp_path)["checks"]) == 1


def test_headline_of_losses_is_the_lowest() -> None:
    records = [bare(n, cell(n, "t", v, "brick", "loss")) for n, v in (("a", 0.5), ("b", 0.4))]
    assert view(records, Path())["headline"]["label"] == "b"


def test_bricks_on_different_tasks_are_compared_by_their_gain() -> None:
    easy = [cell("easy", task, 0.95, "brick") for task in ("a", "b")]
    hard = [cell("hard", task, 0.70, "brick") for task in ("c", "d")]
    floors = [
        cell("frozen", t, v, "floor") for t, v in zip("abcd", (0.94, 0.94, 0.5, 0.5), strict=True)
    ]
    headline = view([bare("r", *easy, *hard, *floors)], Path())["headline"]
    assert headline["label"] == "hard"


def test_mean_over_tasks_has_the_interval_of_independent_figures() -> None:
    cells = [cell("a", task, value, "brick") for task, value in (("x", 0.9), ("y", 0.6))]
    (row,) = view([bare("a", *cells)], Path())["matrix"]["rows"]
    draws = np.random.default_rng(0).binomial(250, [[0.9, 0.6]] * 100_000) / 250
    low, high = np.quantile(draws.mean(-1), [0.025, 0.975])
    assert row["mean"]["value"] == pytest.approx(0.75)
    assert (row["mean"]["low"], row["mean"]["high"]) == pytest.approx((low, high), abs=0.003)


def test_nothing_is_averaged_over_losses_or_half_a_row() -> None:
    half = [cell("a", "x", 0.9, "brick"), cell("b", "x", 0.9, "brick"), cell("b", "y", 1, "brick")]
    means = {r["label"]: r["mean"] for r in view([bare("r", *half)], Path())["matrix"]["rows"]}
    assert means["a"] is None and means["b"]["value"] == pytest.approx(0.95)
    mixed = [cell("a", "x", 0.9, "brick"), cell("a", "y", 0.2, "brick", "loss")]
    assert view([bare("r", *mixed)], Path())["matrix"]["rows"][0]["mean"] is None


def test_curves_are_the_metrics_files(tmp_path: Path) -> None:
    records = [trained(tmp_path, "topic"), trained(tmp_path, "intent")]
    curves = {c["key"]: c["series"] for c in view(records, tmp_path)["curves"]}
    assert list(curves) == ["train/loss", "train/learning_rate", "validation/accuracy"]
    steps = [[step for step, _ in series["points"]] for series in curves["validation/accuracy"]]
    assert steps == [[10, 20, 30, 40, 50, 60]] * 2
    assert curves["train/learning_rate"][0]["points"][0] == [1, 1e-3 / 6 * (1 - 1 / 66)]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5000), st.integers(4, 400), st.integers(0, 2**16))
def test_thinned_curves_keep_ends_and_extremes(length: int, most: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=length)
    points = [[step, float(value)] for step, value in enumerate(values)]
    kept = thin(points, most)
    assert len(kept) == length if length <= most else len(kept) <= most
    assert all(points[step] == [step, value] for step, value in kept)
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    if length:
        assert (kept[0], kept[-1]) == (points[0], points[-1])
        extremes = [value for _, value in kept]
        assert min(extremes) == values.min() and max(extremes) == values.max()


def test_lineage_places_what_was_made_to_the_right_of_what_from(tmp_path: Path) -> None:
    graph = lineage(quickstart(tmp_path), tmp_path)
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == 5 and len(graph["edges"]) == 5
    for edge in graph["edges"]:
        assert nodes[edge["from"]]["column"] < nodes[edge["to"]]["column"]
    assert len({(node["column"], node["place"]) for node in nodes.values()}) == 5
    backbone = nodes[f"backbone {FINGERPRINT}"]
    assert (backbone["kind"], backbone["column"]) == ("backbone", 0)
    weights = [e["weight"] for e in graph["edges"] if "average" in e["to"]]
    assert weights == [0.5, 0.5]
    for node in graph["nodes"]:
        assert node["card"] is None or (tmp_path / node["card"]).is_file()


def test_a_parent_without_a_record_is_drawn_as_such(tmp_path: Path) -> None:
    merged = averaged(tmp_path, [trained(tmp_path, "topic"), trained(tmp_path, "intent")])
    kinds = {node["name"]: node["kind"] for node in lineage([merged], tmp_path)["nodes"]}
    assert kinds == {"topic": "outside", "intent": "outside", merged["brick"]["name"]: "brick"}


def test_a_backbone_that_a_run_made_is_no_parent_of_itself() -> None:
    """Bricks over it hang from its own card."""
    entry = {"version": "1", "path": ".", "parents": []}
    over = {"backbone": {"id": "lm", "fingerprint": FINGERPRINT, "unchanged": True}}
    made = bare("lm", operation="pretrain", brick={"name": "lm", **entry}, **over)
    brick = bare("law", brick={"name": "law", **entry}, **over)
    graph = lineage([brick, made], Path())
    assert {node["id"] for node in graph["nodes"]} == {"lm@1", "law@1"}
    assert [(edge["from"], edge["to"]) for edge in graph["edges"]] == [("lm@1", "law@1")]


def test_a_circle_of_parents_ends() -> None:
    def made(name: str, parent: str) -> Record:
        parents = [{"name": parent, "version": "1"}]
        return bare(name, brick={"name": name, "version": "1", "path": ".", "parents": parents})

    assert len(lineage([made("a", "b"), made("b", "a")], Path())["nodes"]) == 2


def test_links_stay_right_when_everything_is_moved(tmp_path: Path) -> None:
    home = tmp_path / "before"
    shown = view([trained(home, "topic")], home / "pages")
    (tmp_path / "after").parent.mkdir(exist_ok=True)
    home.rename(tmp_path / "after")
    (tmp_path / "after" / "pages").mkdir()
    for link in (shown["runs"][0]["record"], shown["runs"][0]["brick"]["card"]):
        assert (tmp_path / "after" / "pages" / link).is_file()


def test_the_figure_of_a_run_is_its_tasks_own() -> None:
    record = bare(
        "r",
        cell("r", "t", 0.4, "brick", "mcc"),
        metrics={"test/accuracy": figure(0.8), "test/mcc": figure(0.4)},
    )
    assert view([record], Path())["runs"][0]["figure"]["key"] == "test/mcc"


def test_a_comparison_decides_what_its_page_ranks(tmp_path: Path) -> None:
    """Its averages, its seeds, its rivals; the matrices of the other records do not come in."""
    records = compared(tmp_path)
    told = records[0]["comparison"]
    told["groups"] = [
        {"label": "draws", "members": ["topic", "intent"], "mean": None, "normalised": None}
    ]
    records[1]["matrix"].append(cell("stray", "elsewhere", 0.5, "brick"))  # type: ignore[arg-type]
    shown = view(records, tmp_path)
    labels = [row["label"] for row in shown["matrix"]["rows"]]
    assert "stray" not in labels and "draws · mean of 2 seeds" in labels
    group = shown["matrix"]["rows"][labels.index("draws · mean of 2 seeds")]
    both = [0.88, TASKS["topic"][1] - 0.03]  # topic's and intent's own on topic
    assert group["cells"][1]["value"] == pytest.approx(np.mean(both)) and group["mean"] is None
    assert [row["label"] for row in shown["matrix"]["rows"] if row.get("passed_over")] == [
        row["label"] for row in told["rows"] if not row["competes"] and row["role"] != "floor"
    ]
    assert shown["headline"]["of"] == 4 and shown["headline"]["clear"]
    assert shown["headline"]["ceiling"]["value"] == pytest.approx(
        np.mean([value for value, _ in TASKS.values()])
    )
    assert shown["headline"]["cost"]["make_seconds"] == 0.25
    seconds = {shown["matrix"]["rows"][p["row"]]["label"]: p["cost"] for p in shown["costs"]}
    assert seconds["topic"]["make_seconds"] == 9.5
    refitted = {row["label"]: row["mean"] for row in shown["refitted"]["rows"]}
    assert refitted["frozen backbone"]["value"] == pytest.approx(
        np.mean([floor for _, floor in TASKS.values()])
    )
