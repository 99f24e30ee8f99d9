"""Which labels a task has, and what number each one is.

A label in a file is a name or a whole number. Where the section lists ``labels``, a number is a
position in that list; where the labels are found in the training rows, every label is known by its
value. What a CSV calls ``"1"`` may be either, because CSV knows only text.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from cfm_train.errors import UserError, nearest


class BadRow(Exception):
    """Why one row cannot be used; the reader adds the file and the line."""


def as_label(value: Any, typed: bool) -> str | int:
    """A label as a name or a whole number.

    Args:
        value: the cell of the label column.
        typed: False where the format knows only text.

    Raises:
        BadRow: the value is neither.
    """
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip():
        name = value.strip()
        return int(name) if not typed and name.lstrip("-").isdecimal() else name
    shown = "nothing" if value is None or value == "" else repr(value)
    raise BadRow(f"a label is a name or a whole number, found {shown}")


class LabelTable:
    """The labels of a task in the order of the head's outputs.

    Args:
        names: the labels' names.
        values: what stands for each of them in a row, where that is not the name.
        positions: numbers in the rows -> positions in ``names``; None where numbers are values.
        origin: where the labels come from, for the error sentence.
    """

    def __init__(
        self,
        names: Sequence[str],
        values: Sequence[str | int],
        positions: Sequence[int] | None,
        origin: str,
    ) -> None:
        self.names = tuple(names)
        self.origin = origin
        self._index: dict[str | int, int] = {value: i for i, value in enumerate(values)}
        if positions is not None:
            self._index.update(enumerate(positions))

    @classmethod
    def given(cls, labels: Sequence[Any], numbers: Sequence[str] | None = None) -> LabelTable:
        """The table of a section that lists its labels.

        Args:
            labels: ``data.labels``.
            numbers: ``data.hub_labels``: what 0, 1, … mean where the source counts otherwise.

        Raises:
            UserError: a label stands in the list twice, or ``numbers`` names one that is not in it.
        """
        names = [str(label) for label in labels]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(
                f"data.labels: '{twice}' stands in the list twice; name each label once."
            )
        if all(isinstance(label, int) and not isinstance(label, bool) for label in labels):
            return cls(names, list(labels), None, "data.labels")
        order = names if numbers is None else [str(name) for name in numbers]
        for name in order:
            if name not in names:
                raise UserError(
                    f"data.hub_labels: '{name}' is not in data.labels.{nearest(name, names)}"
                )
        return cls(names, names, [names.index(name) for name in order], "data.labels")

    @classmethod
    def found(cls, values: Iterable[str | int]) -> LabelTable:
        """The table of the labels that stand in the training rows, sorted.

        Raises:
            UserError: names and numbers are mixed, or there is only one label.
        """
        distinct = set(values)
        if len({type(value) for value in distinct}) > 1:
            name = next(v for v in distinct if isinstance(v, str))
            number = next(v for v in distinct if isinstance(v, int))
            raise UserError(
                f"data.label: the training rows mix names ('{name}') and numbers ({number}); "
                "use one of the two, or list the names in data.labels."
            )
        if len(distinct) < 2:
            only = min(distinct, default=None)
            raise UserError(
                f"data.label: every training row has the same label {only!r}; a task needs at "
                "least two (or list them all in data.labels)."
            )
        ordered = sorted(distinct)
        return cls([str(value) for value in ordered], ordered, None, "the labels found in train")

    def index(self, value: str | int) -> int:
        """The number of a label.

        Raises:
            BadRow: the label is not in the table.
        """
        found = self._index.get(value)
        if found is None and isinstance(value, int):  # a name such as "1" in a list of names
            found = self._index.get(str(value))
        if found is None:
            raise BadRow(self._unknown(value))
        return found

    def _unknown(self, value: str | int) -> str:
        shown = ", ".join(f"{i} = {name}" for i, name in enumerate(self.names[:8]))
        shown += ", …" if len(self.names) > 8 else ""
        close = difflib.get_close_matches(str(value), self.names, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        return f"label {value!r} is not among {self.origin} ({shown}){hint}"
