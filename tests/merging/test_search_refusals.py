"""What cannot be searched, and that every method can be asked for."""

from __future__ import annotations

from typing import Any

import pytest

from cfm_train.config.merging import complete
from cfm_train.config.searching import axes_of, check_method, methods
from cfm_train.errors import UserError
from cfm_train.merging.search.search import make_search
from tests.merging.benches import LABELS, searching

REFUSED: dict[str, tuple[str, str, Any, dict[str, Any], str]] = {
    "weights of none": ("grid", "magmax", None, {}, "rule=magmax takes no weights"),
    "given": ("grid", "linear", [0.1, 0.2], {}, "are what search=grid finds"),
    "unknown": (
        "grid", "linear", None, {"space": {"densty": [0.1]}}, "'densty' is no number of rule=linear"
    ),
    "not of the sparsifier": ("grid", "linear", None, {"space": {"density": [0.1]}}, "no number"),
    "out of range": ("grid", "ties", None, {"space": {"density": [1.5]}}, "density must be"),
    "too many": ("grid", "linear", None, {"most": 10}, "would try 25 combinations"),
    "nothing": ("bayes", "linear", None, {"weights": None}, "nothing to search"),
    "no bounds": ("bayes", "linear", None, {"weights": [1.0, 0.0]}, "lowest and the highest"),
    "whole": ("cma_es", "linear", None, {"space": {"rank": [2, 8]}}, "whole numbers"),
    "twice": ("grid", "linear", None, {"weights": [0.5, 0.5]}, "once"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_searched_is_refused(case: str) -> None:
    kind, rule, given, search, sentence = REFUSED[case]
    with pytest.raises(UserError, match=sentence):
        axes_of(searching(kind, **search), complete(rule, {}), LABELS, given)


def test_every_method_has_an_option() -> None:
    from cfm_train.config.catalogue import groups

    assert {"none", *methods()} == set(groups()["search"])
    for kind in methods():
        assert make_search(searching(kind)).kind == kind


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="search=bayes needs scikit-learn"):
        check_method(searching("bayes"), complete("linear", {}))
    check_method(searching("grid"), complete("linear", {}))
