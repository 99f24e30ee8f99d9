"""A task's rows are checked before torch: labels, columns, bad rows, leaks, splits, places."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfm_train.data.sources import check, check_all, fingerprint, read_inputs
from cfm_train.data.splits import content_hash, cut, make_disjoint, take
from cfm_train.errors import UserError

Make = Callable[..., dict[str, Any]]
Write = Callable[..., str]

GOOD = [{"text": f"text number {i}", "label": ("ham", "spam")[i % 2]} for i in range(40)]


def test_labels_are_found_in_train_and_sorted(section: Make, write: Write) -> None:
    rows = [{"text": str(i), "label": label} for i, label in enumerate(["c", "a", "b", "a"] * 5)]
    checked = check(section(train=write("a.jsonl", rows), validation_fraction=0.0))
    assert checked.spec.labels == ("a", "b", "c")
    assert [row["label"] for row in checked.rows["train"]] == [2, 0, 1, 0] * 5
    numbers = [{"text": str(i), "label": label} for i, label in enumerate([10, 9, -1] * 5)]
    checked = check(section(train=write("b.jsonl", numbers), validation_fraction=0.0))
    assert checked.spec.labels == ("-1", "9", "10")
    assert [row["label"] for row in checked.rows["train"]] == [2, 1, 0] * 5


def test_given_labels_are_named_or_counted(section: Make, write: Write, tmp_path: Path) -> None:
    labels = ["no", "yes"]
    mixed = [{"text": "a", "label": 1}, {"text": "b", "label": "no"}, {"text": "c", "label": True}]
    keys = {"labels": labels, "validation_fraction": 0.0}
    checked = check(section(train=write("a.jsonl", mixed), **keys))
    assert [row["label"] for row in checked.rows["train"]] == [1, 0, 1]
    (tmp_path / "a.csv").write_text("text,label\na,1\nb,no\n")
    checked = check(section(train=str(tmp_path / "a.csv"), **keys))
    assert [row["label"] for row in checked.rows["train"]] == [1, 0]
    # Numbers in the list are values, not positions.
    stars = [{"text": str(i), "label": i} for i in (5, 1, 3)]
    keys["labels"] = [1, 2, 3, 4, 5]
    checked = check(section(train=write("b.jsonl", stars), **keys))
    assert [row["label"] for row in checked.rows["train"]] == [4, 0, 2]
    (tmp_path / "b.csv").write_text("text,label\na,5\nb,1\n")
    checked = check(section(train=str(tmp_path / "b.csv"), **keys))
    assert [row["label"] for row in checked.rows["train"]] == [4, 0]


def bad(row: Any, at: int = 3) -> list[Any]:
    return [*GOOD[: at - 1], row, *GOOD[at:]]


BAD_ROWS = {
    "no text": ({"label": "ham"}, "no column 'text'"),
    "empty text": ({"text": "  ", "label": "ham"}, "column 'text' is empty"),
    "text a number": ({"text": 3, "label": "ham"}, "must be text, found a number"),
    "text null": ({"text": None, "label": "ham"}, "must be text, found null"),
    "no label": ({"text": "x"}, "no column 'label'"),
    "label null": ({"text": "x", "label": None}, "a label is a name or a whole number"),
    "label a list": ({"text": "x", "label": ["ham"]}, "a label is a name or a whole number"),
    "label a share": ({"text": "x", "label": 0.5}, "found 0.5"),
    "not an object": (["x", "ham"], "must be a JSON object"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_stops_with_file_line_and_reason(section: Make, write: Write, case: str) -> None:
    row, reason = BAD_ROWS[case]
    path = write("bad.jsonl", bad(row))
    with pytest.raises(UserError) as caught:
        check(section(train=path))
    assert f"{path}:3: " in str(caught.value)
    assert reason in str(caught.value)
    assert "data.bad_rows=skip" in str(caught.value)
    checked = check(section(train=path, bad_rows="skip", validation_fraction=0.0))
    assert len(checked.rows["train"]) == len(GOOD) - 1
    assert checked.skipped == {"train": 1}
    assert checked.report()["skipped_rows"] == 1
    assert reason in checked.report()["skipped"][0]


def test_a_label_that_train_does_not_know(section: Make, write: Write) -> None:
    test = write("test.jsonl", [{"text": "new", "label": "hams"}])
    with pytest.raises(UserError, match=r"test.jsonl:1: label 'hams' .* in train .*mean 'ham'\?"):
        check(section(train=write("a.jsonl", GOOD), test=test))
    with pytest.raises(UserError, match=r"label 7 is not among data.labels \(0 = ham, 1 = spam\)"):
        rows = bad({"text": "x", "label": 7})
        check(section(train=write("b.jsonl", rows), labels=["ham", "spam"]))


WRONG = {
    "no source": ({"train": None}, "data.train is not set"),
    "no file": ({"train": "nowhere/a.jsonl"}, "no such file"),
    "no test file": ({"test": "nowhere.jsonl"}, "data.test: nowhere.jsonl"),
    "no column": ({"text": "txt"}, r"data.text: there is no column 'txt'. Did you mean 'text'\?"),
    "no label column": ({"label": "lable"}, r"data.label: .* Did you mean 'label'\?"),
    "column open": ({"label": None}, "data.label is not set.*have: text, label"),
    "task": ({"task": "clasification"}, r"data.task: .*Did you mean 'classification'\?"),
    "metric": ({"metric": "acuracy"}, r"data.metric: .*Did you mean 'accuracy'\?"),
    "labels twice": ({"labels": ["ham", "spam", "ham"]}, "'ham' stands in the list twice"),
    "no folder": ({"train": None, "root": "nowhere"}, "data.root: there is no folder nowhere"),
    "two texts and a third": (
        {"text": ["text"] * 3},
        "data.text names 3 columns; a classification task takes at most 2",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_key_is_one_sentence(section: Make, write: Write, case: str) -> None:
    keys, sentence = WRONG[case]
    with pytest.raises(UserError, match=sentence) as caught:
        check(section(**{"train": write("a.jsonl", GOOD), **keys}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("skip", ["stop", "skip"])
def test_a_column_that_no_row_has(section: Make, write: Write, skip: str) -> None:
    with pytest.raises(UserError, match=r"no column 'txt'.*Did you mean 'text'\?"):
        check(section(train=write("a.jsonl", GOOD), text="txt", bad_rows=skip))


@pytest.mark.parametrize("text", ["prompt", None])
def test_rows_with_whole_conversations_have_a_key_of_their_own(
    section: Make, write: Write, text: str | None
) -> None:
    talk = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    train = write("talk.jsonl", [{"messages": talk}] * 4)
    keys = {"task": "instruct", "label": None, "target": "answer", "train": train}
    with pytest.raises(UserError, match=r"whole conversations: data.messages=messages\.$"):
        check(section(**keys, text=text))
    checked = check(section(**keys, text=text, messages="messages"))
    assert checked.rows["train"][0]["messages"] == talk
    with pytest.raises(UserError, match=r"Did you mean 'messages'\?$"):
        check(section(**keys, text=text, messages="mesages"))


def test_empty_files(section: Make, write: Write) -> None:
    empty, full = write("empty.jsonl", "\n\n"), write("a.jsonl", GOOD)
    for keys in ({"train": empty}, {"train": full, "test": empty}):
        with pytest.raises(UserError, match=r"empty.jsonl: holds no rows"):
            check(section(**keys))
    nothing = write("none.jsonl", [{"text": ""}] * 4)
    with pytest.raises(UserError, match=r"none of the 4 rows can be used \(first: .*none.jsonl:1"):
        check(section(train=nothing, bad_rows="skip"))
    with pytest.raises(UserError, match="same label 'ham'"):
        check(section(train=write("one.jsonl", [GOOD[0], GOOD[2]])))


def test_leaks_are_dropped_from_train_and_told(section: Make, write: Write) -> None:
    nfd = unicodedata.normalize("NFD", "Ein  schöner\tTag")
    train = write("train.jsonl", [*GOOD, {"text": nfd, "label": "ham"}, GOOD[0]])
    test = write("test.jsonl", [{"text": "Ein schöner Tag ", "label": "spam"}, GOOD[3]])
    valid = write("valid.jsonl", [GOOD[5], GOOD[3], {"text": "own", "label": "ham"}])
    checked = check(section(train=train, test=test, validation=valid))
    assert checked.leaks.counts == {
        "validation in test": 1,
        "train in test": 2,
        "train in validation": 1,
    }
    assert f"{train}:41 = {test}:1" in checked.leaks.examples
    assert {name: len(rows) for name, rows in checked.rows.items()} == {
        "train": 39,  # equal rows within train are no leak
        "validation": 2,
        "test": 2,
    }
    with pytest.raises(UserError, match="no training row of 'mine' is left"):
        check(section(train=train, test=train))


text = st.text(st.sampled_from("ab \t\u0301é"), min_size=1, max_size=4).filter(str.strip)
some_rows = st.lists(text, max_size=30).map(
    lambda texts: [{"text": [t], "_at": f"f:{i}"} for i, t in enumerate(texts)]
)


def plain_key(row: dict[str, Any]) -> str:
    return " ".join(unicodedata.normalize("NFC", row["text"][0]).split())


@given(some_rows, some_rows, some_rows)
def test_splits_share_nothing_whatever_they_held(
    train: list[Any], validation: list[Any], test: list[Any]
) -> None:
    splits, leaks = make_disjoint({"train": train, "validation": validation, "test": test})
    keys = {name: {plain_key(row) for row in rows} for name, rows in splits.items()}
    assert not keys["train"] & keys["validation"]
    assert not (keys["train"] | keys["validation"]) & keys["test"]
    assert splits["test"] == test
    kept = sum(len(rows) for rows in splits.values())
    assert kept + leaks.total == len(train) + len(validation) + len(test)


@settings(deadline=None)
@given(some_rows, some_rows, st.floats(0, 0.9), st.integers(0, 3))
def test_a_row_stays_on_its_side_when_rows_are_added(
    rows: list[Any], more: list[Any], fraction: float, draw: int
) -> None:
    kept, taken = cut(rows, fraction, draw)
    assert sorted(map(id, kept + taken)) == sorted(map(id, rows))
    assert not {plain_key(row) for row in kept} & {plain_key(row) for row in taken}
    limit = round(fraction * 2**64)
    number = {id(r): int.from_bytes(content_hash(r)[8 * draw : 8 * draw + 8], "big") for r in rows}
    if len({plain_key(row) for row in rows}) > 1 and fraction > 0:
        assert kept and taken  # never nothing on one side
    if (
        kept
        and taken
        and len({plain_key(r) for r in taken}) > 1
        and len({plain_key(r) for r in kept}) > 1
    ):
        assert all(number[id(row)] < limit for row in taken) or len(taken) == 1
        more_kept, more_taken = cut([*more, *rows], fraction, draw)
        assert {id(r) for r in more_kept if id(r) in number} == {id(row) for row in kept}
        assert {id(r) for r in more_taken if id(r) in number} == {id(row) for row in taken}


def test_validation_and_test_are_cut_from_train(section: Make, write: Write) -> None:
    rows = [{"text": f"row {i}", "label": i % 2} for i in range(2000)]
    keys = {"validation_fraction": 0.1, "test_fraction": 0.2}
    first = check(section(train=write("a.jsonl", rows), **keys))
    sizes = {name: len(split) for name, split in first.rows.items()}
    # Three standard deviations of a binomial around the shares asked for.
    assert abs(sizes["test"] - 400) < 54 and abs(sizes["validation"] - 160) < 36
    random.Random(0).shuffle(rows)
    more = [*rows, *({"text": f"new {i}", "label": 0} for i in range(100))]
    second = check(section(train=write("b.jsonl", more), **keys))
    for name in ("validation", "test"):
        held = {row["text"][0] for row in first.rows[name]}
        assert {
            t for row in second.rows[name] if not (t := row["text"][0]).startswith("new")
        } == held


def test_limit_takes_a_fixed_draw_of_train_only(section: Make, write: Write) -> None:
    path = write("a.jsonl", GOOD)
    whole = check(section(train=path, validation_fraction=0.2))
    some = check(section(train=path, validation_fraction=0.2, limit=10))
    assert len(some.rows["train"]) == 10
    assert some.rows["validation"] == whole.rows["validation"]
    assert [row for row in whole.rows["train"] if row in some.rows["train"]] == some.rows["train"]
    assert take(whole.rows["train"], None) == whole.rows["train"]


def test_fingerprint_is_of_what_the_rows_say(section: Make, write: Write, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    one = check(section(train=write("a.jsonl", GOOD)))
    two = check(section(train=write("elsewhere/b.jsonl", GOOD)))
    assert one.fingerprints == two.fingerprints
    line = json.dumps({"label": 0, "text": ["x"]}, sort_keys=True) + "\n"
    assert (
        fingerprint([{"text": ["x"], "label": 0, "_at": "a:1"}])
        == hashlib.sha256(line.encode()).hexdigest()
    )
    changed = [dict(GOOD[0], label="spam"), *GOOD[1:]]
    three = check(section(train=write("c.jsonl", changed)))
    assert three.fingerprints["train"] != one.fingerprints["train"]


def test_root_reads_the_files_of_the_tasks_name(
    section: Make, write: Write, tmp_path: Path
) -> None:
    write("mine.train.jsonl", GOOD[:30])
    (tmp_path / "mine.test.csv").write_text("text,label\nnew,ham\n")
    checked = check(section(root=str(tmp_path), validation_fraction=0.0))
    assert (len(checked.rows["train"]), len(checked.rows["test"])) == (30, 1)
    with pytest.raises(UserError, match=r"no mien.train.jsonl. Did you mean 'mine'\?"):
        check(section(root=str(tmp_path), name="mien"))


def test_several_tasks(section: Make, shared: Path) -> None:
    root = str(shared / "data" / "tasks")
    many = check_all(section(tasks=["trec", "mrpc"], root=root, limit=50))
    assert [task.spec.name for task in many] == ["trec", "mrpc"]
    assert [len(task.rows["train"]) for task in many] == [50, 50]
    assert [task.spec.pair for task in many] == [False, True]
    with pytest.raises(UserError, match="listed twice"):
        check_all(section(tasks=["trec", "trec"], root=root))
    with pytest.raises(UserError, match="Did you mean 'trec'"):
        check_all(section(tasks=["trek"], root=root))


def test_rows_to_predict_need_no_answers(section: Make, write: Write) -> None:
    path = write("in.jsonl", [{"text": "a"}, {"text": "b", "label": "unknown"}])
    rows = read_inputs(path, section())
    assert rows == [{"text": ["a"], "_at": f"{path}:1"}, {"text": ["b"], "_at": f"{path}:2"}]
    with pytest.raises(UserError, match=r"in2.jsonl:1: .*no column 'text'"):
        read_inputs(write("in2.jsonl", [{"txt": "a"}]), section())


def test_checking_five_thousand_rows_is_without_torch(shared: Path) -> None:
    code = (
        "import sys\n"
        "from cfm_train.config.compose import option\n"
        "from cfm_train.data.sources import check\n"
        f"check(option('data', 'sst2', root={str(shared / 'data' / 'tasks')!r}))\n"
        "print([name for name in ('torch', 'datasets', 'transformers') if name in sys.modules])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"
