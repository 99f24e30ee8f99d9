"""Every row of a task read, and every check of it made, before torch is imported.

A row that cannot be used stops the run with its file, line and reason, or is left out and counted
(``data.bad_rows=skip``). What comes out is ready to be tokenised.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cfm_train.data.files import Raw, read_file
from cfm_train.data.labels import BadRow, LabelTable
from cfm_train.data.places import SPLITS, local, location, raw_rows, with_source_columns
from cfm_train.data.rows import MissingColumn, Row, parse
from cfm_train.data.splits import Leaks, cut, make_disjoint, take
from cfm_train.data.tagging import complete
from cfm_train.data.tasks import LABELLED, TaskSpec, as_columns, make_spec
from cfm_train.errors import UserError, nearest

#: Keys of a section with several tasks that hold for each of them; the rest stands in their YAMLs.
SHARED = ("bad_rows", "max_length", "target_max_length")


@dataclass
class Checked:
    """A task whose rows have all been read and found good.

    Attributes:
        spec: the task.
        section: the data section it was read from.
        rows: split -> rows (see ``rows``); labels are positions in ``spec.labels``.
        fingerprints: split -> SHA-256 of its rows, whatever file they stood in.
        skipped: split -> bad rows left out (``bad_rows=skip``), only where there are any.
        reasons: why, for the first few of them.
        leaks: rows dropped because another split holds the same input.
    """

    spec: TaskSpec
    section: dict[str, Any]
    rows: dict[str, list[Row]]
    fingerprints: dict[str, str]
    skipped: dict[str, int]
    reasons: list[str]
    leaks: Leaks

    def report(self) -> dict[str, Any]:
        """What the record says of the data."""
        return {
            "name": self.spec.name,
            "rows": {name: len(rows) for name, rows in self.rows.items()},
            "fingerprints": self.fingerprints,
            "skipped_rows": sum(self.skipped.values()),
            "skipped": self.reasons,
            "leaks": self.leaks.to_json(),
        }


def check(section: Mapping[str, Any]) -> Checked:
    """Reads and checks every row of a task.

    Args:
        section: a data section with every key of ``conf/data/custom.yaml``.

    Raises:
        UserError: the first thing that is wrong, with its key, or its file and line.
    """
    section = with_source_columns(section)
    _check_keys(section)
    bad = _BadRows(section["bad_rows"])
    read = {split: list(bad.parse(split, raw_rows(section, split), section)) for split in SPLITS}
    if not read["train"]:
        raise UserError(_empty(section, "train", bad))
    table = _labels(section, read["train"])
    if table is not None:
        read = {split: list(bad.index(split, rows, table)) for split, rows in read.items()}
    if location(section, "test") is not None and not read["test"]:
        raise UserError(_empty(section, "test", bad))
    disjoint, leaks = make_disjoint(read)
    if not read["test"]:
        disjoint["train"], disjoint["test"] = cut(
            disjoint["train"], section["test_fraction"], draw=1
        )
    if not read["validation"]:
        disjoint["train"], disjoint["validation"] = cut(
            disjoint["train"], section["validation_fraction"], draw=0
        )
    disjoint["train"] = take(disjoint["train"], section["limit"])
    if not disjoint["train"]:
        raise UserError(
            f"data: no training row of '{section['name']}' is left: all {leaks.total} stand in "
            f"validation or test too (first: {', '.join(leaks.examples[:1])})."
        )
    return Checked(
        spec=make_spec(section, None if table is None else table.names),
        section=section,
        rows=disjoint,
        fingerprints={split: fingerprint(rows) for split, rows in disjoint.items() if rows},
        skipped=bad.counts,
        reasons=bad.reasons,
        leaks=leaks,
    )


def task_sections(section: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The section itself, or one for each task where it lists several (``data.tasks``).

    Args:
        section: a data section; of one that lists tasks, ``root`` and ``limit`` (where set) and the
            keys in ``SHARED`` hold for every task.

    Raises:
        UserError: an unknown task, or one that is listed twice.
    """
    if not section["tasks"]:
        return [dict(section)]
    from cfm_train.config.compose import option  # Hydra: only where a list of tasks needs it

    names = list(section["tasks"])
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"data.tasks: '{min(twice)}' is listed twice; name each task once.")
    shared = {key: section[key] for key in SHARED}
    shared.update({key: section[key] for key in ("root", "limit") if section[key] is not None})
    return [option("data", name, **shared) for name in names]


def check_all(section: Mapping[str, Any]) -> list[Checked]:
    """The checked task of a section, or all of them where it lists several.

    Raises:
        UserError: as ``task_sections`` and ``check``.
    """
    return [check(each) for each in task_sections(section)]


def read_inputs(path: str, section: Mapping[str, Any]) -> list[Row]:
    """Rows to predict: a task's rows without their answers.

    Args:
        path: the file (``data.input``).
        section: the section the brick was trained on, for the task type and the columns.

    Raises:
        UserError: the file or a row of it cannot be used.
    """
    raws = read_file(local(path), key="data.input", unit=section["unit"])
    rows = list(_BadRows("stop").parse("input", raws, section, answers=False))
    if not rows:
        raise UserError(f"data.input: {path}: holds no rows.")
    return rows


def data_fingerprints(tasks: Mapping[str, Checked]) -> dict[str, str]:
    """``data/<task>/<split>`` -> fingerprint of the rows, of every task, for the config hash."""
    return {
        f"data/{name}/{split}": value
        for name, task in tasks.items()
        for split, value in task.fingerprints.items()
    }


def fingerprint(rows: list[Row]) -> str:
    """SHA-256 of rows in their order, without where they stood."""
    digest = hashlib.sha256()
    for row in rows:
        content = {key: value for key, value in row.items() if not key.startswith("_")}
        digest.update(json.dumps(content, sort_keys=True, ensure_ascii=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()


#: Task type -> keys that must name columns, with the most that each may name (None: any number).
REQUIRED: dict[str, dict[str, int | None]] = {
    "classification": {"text": 2, "label": 1},
    "multilabel": {"text": 2, "label": None},
    "regression": {"text": 2, "label": 1},
    "token": {"text": 1, "label": 1},
    "causal": {"text": 1},
    "instruct": {"text": None, "target": 1},
    "seq2seq": {"text": None, "target": 1},
}


def _check_keys(section: Mapping[str, Any]) -> None:
    """Refuses column keys that are open (with what is on offer), too many, or of no use."""
    make_spec(section, None)
    task, required = section["task"], REQUIRED[section["task"]]
    used = {*required, *(("system", "messages") if task == "instruct" else ())}
    for key in ("label", "target", "system", "messages"):
        if section[key] and key not in used:
            raise UserError(
                f"data.{key}: a {task} task has no {key}; leave it null, or set data.task."
            )
    if section["messages"]:  # holds question and answer
        return
    for key, most in required.items():
        columns = as_columns(section[key])
        if most is not None and len(columns) > most:
            raise UserError(
                f"data.{key} names {len(columns)} columns; a {task} task takes at most {most}."
            )
        if not columns:
            raws = raw_rows(section, "train")
            first = next((raw.values for raw in raws if raw.values), None) or {}
            offered = f" The training rows have: {', '.join(first)}." if first else ""
            raise UserError(f"data.{key} is not set; name the column: data.{key}=COLUMN.{offered}")


def _labels(section: Mapping[str, Any], rows: list[Row]) -> LabelTable | None:
    """The task's labels: as listed, as the Hub names them, or as found in the training rows."""
    if section["task"] not in LABELLED:
        return None
    if section["labels"]:
        return LabelTable.given(section["labels"], section["hub_labels"])
    columns = as_columns(section["label"])
    if len(columns) > 1:  # a column of 0/1 for each label
        return LabelTable.given(columns)
    values = (row["label"] for row in rows)
    found = [v for value in values for v in (value if isinstance(value, list) else [value])]
    return LabelTable.found(complete(found) if section["task"] == "token" else found)


def _empty(section: Mapping[str, Any], split: str, bad: _BadRows) -> str:
    place = location(section, split)
    where = f"{section['hub']}[{split}]" if place is None else f"{place[0]}: {place[1]}"
    if bad.counts.get(split):
        return (
            f"{where}: none of the {bad.counts[split]} rows can be used (first: {bad.reasons[0]})."
        )
    return f"{where}: holds no rows."


class _BadRows:
    """Stops at the first bad row, or leaves bad rows out and counts them."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.counts: dict[str, int] = {}
        self.reasons: list[str] = []

    def parse(
        self, split: str, raws: Iterator[Raw], section: Mapping[str, Any], *, answers: bool = True
    ) -> Iterator[Row]:
        """Makes rows of a task; a column that no row has stops whatever the policy."""
        seen_good, absent = False, None
        for raw in raws:
            try:
                yield parse(raw, section, answers=answers)
                seen_good = True
            except MissingColumn as problem:
                absent = absent or problem
                hint = nearest(problem.column, problem.available).rstrip(".")
                reason = f"data.{problem.key}: {problem}.{hint}"
                self.refuse(split, raw.at, reason, skippable=seen_good)
            except BadRow as problem:
                self.refuse(split, raw.at, str(problem))
        if absent and not seen_good:
            hint = nearest(absent.column, absent.available)
            raise UserError(f"data.{absent.key}: {absent} in any row of {split}.{hint}")

    def index(self, split: str, rows: list[Row], table: LabelTable) -> Iterator[Row]:
        """Replaces label names and numbers by positions."""
        for row in rows:
            value = row["label"]
            try:
                many = isinstance(value, list)
                row["label"] = [table.index(v) for v in value] if many else table.index(value)
                yield row
            except BadRow as problem:
                self.refuse(split, row["_at"], str(problem))

    def refuse(self, split: str, at: str, reason: str, *, skippable: bool = True) -> None:
        """Raises, or counts; ``skippable``: whether other rows may well be better."""
        if self.policy == "stop":
            end = "" if reason.endswith("?") else "."
            advice = (
                ""
                if split == "input" or not skippable
                else " Correct it, or leave bad rows out: data.bad_rows=skip."
            )
            raise UserError(f"{at}: {reason}{end}{advice}")
        self.counts[split] = self.counts.get(split, 0) + 1
        if len(self.reasons) < 5:
            self.reasons.append(f"{at}: {reason}")
