"""The tree: one text, one JSON, one digest for one configuration, in every process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfm_train.configuration.expression import BrickRef, Call, bricks, from_json
from cfm_train.configuration.parser import parse
from cfm_train.errors import UserError

NAMES = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,9}[A-Za-z0-9_-])?", fullmatch=True).filter(
    lambda name: ".." not in name and name != "stats"
)
WORDS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
REFS = st.builds(BrickRef, NAMES, st.none() | st.from_regex(r"[0-9a-f]{1,12}", fullmatch=True))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | WORDS
    | st.sampled_from(
        ["true", "NULL", "nan", "1e5", "a,b", "]", "a b", "@", "None", "-", '"', "\n"]
    )
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=5)
PARAMS = st.dictionaries(WORDS.filter(lambda word: word != "weights"), VALUES, max_size=3).map(
    lambda params: tuple(params.items())
)


def calls(inner: st.SearchStrategy) -> st.SearchStrategy:
    parts = st.lists(inner, min_size=1, max_size=3).map(tuple)
    ruled = st.builds(Call, st.sampled_from(["merge", "route"]), WORDS, parts, PARAMS)
    stitched = st.builds(Call, st.just("stitch"), st.none(), parts, PARAMS)
    weighted = parts.flatmap(
        lambda args: st.lists(st.floats(-2, 2), min_size=len(args), max_size=len(args)).map(
            lambda weights: Call("merge", "linear", args, (("weights", tuple(weights)),))
        )
    )
    return ruled | stitched | weighted


TREES = st.recursive(REFS, calls, max_leaves=8)


@given(TREES)
def test_text_comes_back_as_the_same_tree(tree):
    again = parse(str(tree))
    assert again == tree and hash(again) == hash(tree)
    assert str(again) == str(tree) and again.digest() == tree.digest()


@given(TREES)
def test_json_comes_back_as_the_same_tree(tree):
    again = from_json(tree.to_json())
    assert again == tree and again.to_json() == tree.to_json()
    assert json.loads(tree.to_json()) == json.loads(json.dumps(tree.to_dict()))
    assert tree.digest() == hashlib.sha256(tree.to_json().encode()).hexdigest()


@given(TREES, TREES)
def test_trees_are_equal_when_their_text_is(one, two):
    assert (one == two) == (str(one) == str(two)) == (one.digest() == two.digest())


@given(st.lists(st.tuples(WORDS.filter(lambda w: w != "weights"), SCALARS), max_size=4))
def test_the_order_of_parameters_does_not_matter(params):
    params = list(dict(params).items())
    one = Call("merge", "ties", (BrickRef("a"),), tuple(params))
    two = Call("merge", "ties", (BrickRef("a"),), tuple(reversed(params)))
    assert one == two and str(one) == str(two)


def test_the_digest_is_the_same_in_every_process():
    text = "merge(ties, [a@1f, stitch([b, c])], density=0.2, weights=[1, 2.5], y=x, mode='é b')"
    code = (
        "import sys; from cfm_train.configuration.parser import parse; t = parse(sys.argv[1]);"
        "print(t.digest(), hash(t), t)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, text],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "12345")
    }
    assert len(outputs) == 1 and parse(text).digest() in outputs.pop()


def test_the_digest_is_pinned():
    """It stands in config hashes and records: if it changes, every finished run starts again."""
    tree = parse("merge(ties, [sst2@1f2c3d4e5f60, trec], density=0.2)")
    assert tree.to_json() == (
        '{"args":[{"brick":"sst2","version":"1f2c3d4e5f60"},{"brick":"trec","version":null}],'
        '"call":"merge","params":{"density":0.2},"rule":"ties"}'
    )
    assert tree.digest() == hashlib.sha256(tree.to_json().encode()).hexdigest()


def test_one_and_true_and_one_point_zero_are_three_things():
    texts = [f"merge(x, [a], k={value})" for value in ("1", "1.0", "true", '"1"', "[1]", "null")]
    trees = [parse(text) for text in texts]
    assert len(set(trees)) == len({tree.digest() for tree in trees}) == len(texts)
    assert [str(tree) for tree in trees] == texts


def test_a_tree_cannot_be_changed():
    tree = parse("merge(ties, [a, b])")
    for name in ("fn", "rule", "args", "params"):
        with pytest.raises(AttributeError):
            setattr(tree, name, None)
    values = [1, [2]]
    call = Call("merge", "x", (BrickRef("a"),), (("k", values),))  # type: ignore[arg-type]
    values.append(3)
    assert dict(call.params)["k"] == (1, (2,))


def test_bricks_from_left_to_right():
    tree = parse("stitch([a, merge(ties, [b@1f, c]), a])")
    assert [str(ref) for ref in bricks(tree)] == ["a", "b@1f", "c", "a"]
    assert list(bricks(parse("x"))) == [BrickRef("x")]


ONE = (BrickRef("a"),)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: BrickRef("../x"), "cannot name an artifact"),
        (lambda: BrickRef("a", "XYZ"), "after '@'"),
        (lambda: BrickRef("a", ""), "after '@'"),
        (lambda: BrickRef("a", "0" * 13), "after '@'"),
        (lambda: Call("eval", None, (BrickRef("a"),)), "no function"),
        (lambda: Call("merge", None, (BrickRef("a"),)), "needs a rule"),
        (lambda: Call("stitch", "ties", (BrickRef("a"),)), "no rule"),
        (lambda: Call("merge", "a.b", (BrickRef("a"),)), "plain words"),
        (lambda: Call("merge", "ties", ()), "its list is empty"),
        (lambda: Call("merge", "ties", ONE, (("weights", (1, 2)),)), "2 weights for 1"),
        (lambda: Call("merge", "ties", ONE, (("k", float("inf")),)), "finite number"),
        (lambda: Call("merge", "ties", ONE, (("k", {1: 2}),)), "is no value"),
        (lambda: Call("merge", "ties", ONE, (("k", 1), ("k", 2))), "twice"),
        (lambda: Call("merge", "ties", ONE, (("a b", 1),)), "plain words"),
    ],
)
def test_wrong_trees_cannot_be_made(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()


@pytest.mark.parametrize(
    "text",
    ["", "1", "[]", "{}", '{"brick": "a"}', '{"brick": 1, "version": null}',
     '{"brick": "a", "version": null, "x": 1}', '{"call":"merge","rule":"x","args":1,"params":{}}',
     '{"call":"merge","rule":"x","args":[[]],"params":{}}',
     '{"call":1,"rule":1,"args":[],"params":[]}',
     '{"call":"merge","rule":1,"args":[{"brick":"a","version":null}],"params":{}}',
     '{"call":[],"rule":"x","args":[{"brick":"a","version":null}],"params":{}}'],
)  # fmt: skip
def test_json_of_something_else_is_refused(text):
    with pytest.raises(UserError):
        from_json(text)
