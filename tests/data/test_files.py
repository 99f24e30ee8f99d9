"""Every format gives the same rows, each with its line; a damaged file is one sentence."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from cfm_train.data.files import kind_of, read_file
from cfm_train.errors import UserError

ROWS = [
    {"text": "plain", "label": "a"},
    {"text": 'two\nlines, a comma and a "quote"', "label": "b"},
    {"text": "ümläut 漢字 \u2028 separator", "label": "a"},
]


def values(path: Path, **kw: str) -> list[dict[str, str] | None]:
    return [raw.values for raw in read_file(path, key="data.train", **kw)]


def lines(path: Path) -> list[int]:
    return [int(raw.at.rsplit(":", 1)[1]) for raw in read_file(path, key="data.train")]


def write(path: Path, kind: str, encoding: str = "utf-8") -> None:
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding=encoding) as file:
            writer = csv.DictWriter(
                file, ["text", "label"], delimiter="\t" if kind == "tsv" else ","
            )
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS), encoding=encoding)
    else:
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
        path.write_text(text, encoding=encoding)


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_every_format_gives_the_same_rows(
    tmp_path: Path, kind: str, packed: bool, encoding: str
) -> None:
    path = tmp_path / f"rows.{kind}"
    write(path, kind, encoding)
    if packed and kind != "parquet":
        path = path.with_name(path.name + ".gz")
        path.write_bytes(gzip.compress((tmp_path / f"rows.{kind}").read_bytes()))
    assert values(path) == ROWS


def test_lines_are_those_of_an_editor(tmp_path: Path) -> None:
    for kind, expected in {"jsonl": [1, 2, 3], "csv": [2, 3, 5], "json": [1, 2, 3]}.items():
        write(tmp_path / f"rows.{kind}", kind)
        assert lines(tmp_path / f"rows.{kind}") == expected
    gaps = tmp_path / "gaps.jsonl"
    gaps.write_text('\n{"a": 1}\n\n   \n{"a": 2}\n')
    assert lines(gaps) == [2, 5]


def test_a_bad_row_is_told_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n[1]\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"a": 2}\n')
    raws = list(read_file(path, key="data.train"))
    assert [raw.values for raw in raws] == [{"a": 1}, None, None, None, None, {"a": 2}]
    told = [raw.problem or "" for raw in raws]
    assert "broken JSON" in told[1] and "column" in told[1]
    assert "found a list" in told[2]
    assert "UTF-8" in told[3]
    assert "nested" in told[4]

    table = tmp_path / "bad.csv"
    table.write_text("a,b\n1,2\n1\n1,2,3\n4,5\n")
    raws = list(read_file(table, key="data.train"))
    assert [raw.values and dict(raw.values) for raw in raws][::3] == [
        {"a": "1", "b": "2"},
        {"a": "4", "b": "5"},
    ]
    assert "fewer cells" in (raws[1].problem or "") and "more cells" in (raws[2].problem or "")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_header_of_a_csv_file_says_what_is_between_its_cells(
    delimiter: str, tmp_path: Path
) -> None:
    """Whatever the texts hold, quotes and line breaks included; and lines are counted as ever."""
    texts = ["a; b, c | d", "one\ntwo; three", "x\ty", 'he said "no"', "", "plain"]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["text", "long, name" if delimiter == "," else "label"])
        writer.writerows([text, "1,5"] for text in texts)
    found = list(read_file(path, key="data.train"))
    assert [raw.values and list(raw.values.values()) for raw in found] == [
        [text, "1,5"] for text in texts
    ]
    assert [raw.at.rsplit(":", 1)[1] for raw in found] == ["2", "3", "5", "6", "7", "8"]


def test_one_column_and_a_header_that_tells_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text\na;b\n")
    assert values(path) == [{"text": "a;b"}]
    path.write_text('"text;label"\nx\n')
    assert values(path) == [{"text;label": "x"}]
    path.write_text("text;label|note\na;b|c\n")
    with pytest.raises(UserError, match="cannot be told: save it with commas, or as"):
        values(path)
    path.write_text("")
    assert values(path) == []


def test_text_files_by_line_paragraph_and_file(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one\ntwo\n\n\nthree\n")
    texts = {
        u: [v and v["text"] for v in values(path, unit=u)] for u in ("line", "paragraph", "file")
    }
    assert texts == {
        "line": ["one", "two", "three"],
        "paragraph": ["one\ntwo", "three"],
        "file": ["one\ntwo\n\n\nthree"],
    }


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.jsonl", None, ["data.train", "no such file", "Did you mean", "absend.jsonl"]),
        ("rows.xlsx", b"x", ["cannot tell the format", ".jsonl"]),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 500, mtime=0)[:-12], ["gzip", "damaged"]),
        ("rows.parquet", b"PAR1 and nothing else", ["not a readable Parquet file"]),
        ("rows.csv", "a,b\n\u00e4,1\n".encode("latin-1"), ["not UTF-8"]),
        ("rows.json", b'{"a": 1}', ["array of objects", "an object"]),
        ("rows.json", b'[{"a": 1},\n{]', ["rows.json:2", "broken JSON"]),
    ],
)
def test_a_damaged_file_is_one_sentence(
    tmp_path: Path, name: str, content: bytes | None, words: list[str]
) -> None:
    (tmp_path / "absend.jsonl").write_text("{}")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_file(tmp_path / name, key="data.train"))
    for word in [*words, name.split(".")[0]]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        list(read_file(tmp_path, key="data.train"))


def test_endings_are_read_without_regard_to_case() -> None:
    assert kind_of(Path("A.JSONL.GZ")) == ".jsonl"
