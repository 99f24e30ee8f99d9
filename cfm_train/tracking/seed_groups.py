"""Runs that differ by their seed alone: one row for their mean beside one for each.

A single seed is a draw, so it wins nothing: where a setting was run with several, their mean stands
for it, with Student's interval over the seeds (`evaluation.seeds`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cfm_train.evaluation.seeds import over_seeds

Json = dict[str, Any]

#: Operations that name a brick in their record which they did not make.
READERS = ("evaluate", "predict", "compare", "analyze")


def families(records: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """The runs that made a brick which others made with another seed.

    Returns:
        Number of the record -> hash of all that decides its result but the seed.
    """
    found: dict[str, dict[int, int]] = {}  # family -> seed -> the first record with it
    for at, record in enumerate(records):
        family = record.get("seedless_hash")
        if family and record["brick"] is not None and record["operation"] not in READERS:
            found.setdefault(family, {}).setdefault(record["seed"], at)
    return {
        at: family for family, seeds in found.items() if len(seeds) > 1 for at in seeds.values()
    }


def with_groups(
    rows: Sequence[Json],
    records: Sequence[Mapping[str, Any]],
    comparison: Mapping[str, Any] | None = None,
) -> list[Json]:
    """Puts a row of means before the rows of its seeds, which follow it.

    Args:
        rows: rows of the matrix, their cells in the order of its columns.
        records: the records that they come from.
        comparison: names the groups itself, where there is one.

    Returns:
        All rows; one of a group has ``members``, the numbers of the rows that it is the mean of,
        and those are marked as ``part``.
    """
    family_of = families(records)
    groups: dict[tuple[str, str, str], list[Json]] = {}
    of_group = {
        label: group["label"] for group in (comparison or {}).get("groups", ())
        for label in group["members"]
    }  # fmt: skip
    for row in rows:
        if row["label"] in of_group and row["role"] in ("brick", "merged"):
            name = of_group[row["label"]]
            groups.setdefault((row["role"], name, name), []).append(row)
            continue
        family = family_of.get(row["runs"][0]) if len(row["runs"]) == 1 else None
        if family and (records[row["runs"][0]]["brick"] or {}).get("name") == row["brick"]:
            groups.setdefault((row["role"], row["brick"], family), []).append(row)
    groups = {key: members for key, members in groups.items() if len(members) > 1}
    several = [brick for _, brick, _ in groups]
    before: dict[int, Json] = {}
    for (role, brick, family), members in groups.items():
        own = f" · {family[:6]}" if several.count(brick) > 1 else ""
        before[id(members[0])] = {
            "label": f"{brick}{own} · mean of {len(members)} seeds",
            "brick": brick,
            "role": role,
            "runs": [at for member in members for at in member["runs"]],
            "cells": [_mean(cells) for cells in zip(*(m["cells"] for m in members), strict=True)],
            "of": members,
            **next(({"note": member["note"]} for member in members if "note" in member), {}),
        }
        for member in members:
            member["part"] = True
    ordered: list[Json] = []
    for row in rows:  # a group stands together, where its first seed stood
        if group := before.get(id(row)):
            ordered += [group, *group["of"]]
        elif not row.get("part"):
            ordered.append(row)
    numbers = {id(row): number for number, row in enumerate(ordered)}
    for row in before.values():
        row["members"] = [numbers[id(member)] for member in row.pop("of")]
    return ordered


def _mean(cells: Sequence[Json | None]) -> Json | None:
    """A cell over seeds, where all of them have it."""
    measured = [cell for cell in cells if cell is not None]
    if len(measured) < len(cells):
        return None
    heads = {cell.get("head") for cell in measured}
    head = heads.pop() if len(heads) == 1 else None
    figure: Json = over_seeds([cell["value"] for cell in measured])
    return figure | ({"head": head} if head is not None else {})
