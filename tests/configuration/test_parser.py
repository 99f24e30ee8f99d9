"""The parser: reads what a person writes, evaluates nothing, and points at what it cannot read."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cfm_train.configuration.expression import BrickRef, Call
from cfm_train.configuration.parser import parse
from cfm_train.errors import UserError

A, B = BrickRef("a"), BrickRef("b")


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("sst2", BrickRef("sst2")),
        ("sst2@1f2c", BrickRef("sst2", "1f2c")),
        (" sst2@123456789012 ", BrickRef("sst2", "123456789012")),
        ("my-brick.v2@0e1", BrickRef("my-brick.v2", "0e1")),
        ("20news", BrickRef("20news")),
        ("1e5", BrickRef("1e5")),
        ("007", BrickRef("007")),
        ("for", BrickRef("for")),
        ("None@1", BrickRef("None", "1")),
        ("'sst2@1f'", BrickRef("sst2", "1f")),
        ("merge(ties, [a, b])", Call("merge", "ties", (A, B))),
        ("merge(ties,[a,b,],)", Call("merge", "ties", (A, B))),
        ("merge(\n  ties,\n\t[a,\n b]\n)\n", Call("merge", "ties", (A, B))),
        ("(merge)(ties, ([(a), b]))", Call("merge", "ties", (A, B))),
        (
            "merge(ties, [a@1f, b], density=0.2, weights=[1, -2.5e-1])",
            Call(
                "merge",
                "ties",
                (BrickRef("a", "1f"), B),
                (("density", 0.2), ("weights", (1, -0.25))),
            ),
        ),
        ("stitch([a, b])", Call("stitch", None, (A, B))),
        ("route(arrow, [a, b], top_k=1)", Call("route", "arrow", (A, B), (("top_k", 1),))),
        (
            "stitch([a, merge(linear, [a, route(x, [b])])], deep=[[1], []])",
            Call(
                "stitch",
                None,
                (A, Call("merge", "linear", (A, Call("route", "x", (B,))))),
                (("deep", ((1,), ())),),
            ),
        ),
    ],
)
def test_what_is_read(text, tree):
    assert parse(text) == tree


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1), ("-1", -1), ("+1", 1), ("007", 7), ("1.0", 1.0), ("1.", 1.0), (".5", 0.5),
        ("1e5", 100000.0), ("1E-3", 0.001), ("-.5e+1", -5.0), ("true", True), ("False", False),
        ("null", None), ("Null", None), ("none", "none"), ("None", "None"), ("mean", "mean"),
        ("a.b-c", "a.b-c"), ("_x", "_x"), ('"a b"', "a b"), ("'a \"b\"'", 'a "b"'),
        ('"\\u00e9\\n"', "é\n"), ("'é'", "é"), ('""', ""), ("''", ""), ('"true"', "true"),
        ('"1"', "1"), ("[]", ()), ("[a, 1, [null]]", ("a", 1, (None,))), ("'a@1'", "a@1"),
        ("123456789012345678901234567890", 123456789012345678901234567890),
    ],
)  # fmt: skip
def test_values(text, value):
    ((_, read),) = parse(f"merge(x, [a], k={text})").params  # type: ignore[union-attr]
    assert read == value and type(read) is type(value)


#: Text, the character that the sentence points at, and what it says.
REFUSED = [
    ("", None, "is empty"),
    ("   ", None, "is empty"),
    ("mrge(ties, [a])", 1, "Did you mean 'merge'?"),
    ("merge(ties, [a)", 15, "brackets do not match"),
    ("merge(ties, [a]", 6, "brackets do not match"),
    ("merge(ties, [a]))", 17, "brackets do not match"),
    ("merge(ties, a)", 13, "in square brackets"),
    ("merge(ties, a, b)", 16, "merge is written merge(RULE, [a, b])"),
    ("merge([a, b])", 1, "something is missing"),
    ("merge()", 1, "something is missing"),
    ("merge(ties)", 1, "something is missing"),
    ("stitch(ties, [a])", 14, "stitch is written stitch([a, b])"),
    ("stitch(a)", 8, "in square brackets"),
    ("merge([ties], [a])", 7, "its rule is a word"),
    ("merge(ties, [])", 1, "its list is empty"),
    ("merge(ties, [a b])", 14, "comma"),
    ("merge(ties, [a,, b])", 16, "cannot stand here"),
    ("merge(ties, [a], density)", 18, "merge is written"),
    ("merge(ties, [a], 0.2)", 18, "merge is written"),
    ("merge(ties, x=1, [a])", 21, "come after the bricks"),
    ("merge(ties, [a], x=)", None, "cannot stand here"),
    ("merge(ties, [a], x=1, x=2)", 1, "twice"),
    ("merge(ties, [a, b], weights=[1])", 1, "1 weights for 2 bricks"),
    ("merge(ties, [a], x=nan)", 20, "no number and no plain word"),
    ("merge(ties, [a], x=-inf)", 20, "no number and no plain word"),
    ("merge(ties, [a], x=1e999)", 20, "no number and no plain word"),
    ("merge(ties, [a], x=1_000)", 20, "put a text in quotes"),
    ("merge(ties, [a], x=a@1f)", 20, "put a text in quotes"),
    ("merge(ties, [a], x=" + "9" * 5000 + ")", 20, "too long"),
    ("merge(ties, [a], x=merge(ties, [b]))", 20, "a value is a number"),
    ("merge(ties, [a], x=(1, 2))", 20, "a value is a number"),
    ("a@", 1, "after '@'"),
    ("a@1g", 1, "after '@'"),
    ("a@1@2", 1, "after '@'"),
    ("-a", 1, "cannot name an artifact"),
    ("stats", 1, "keeps that folder for itself"),
    ("../x", 1, "cannot name an artifact"),
    ("a/b", 1, "cannot name an artifact"),
    ("é", 1, "means nothing here"),
    ("'abc", 1, "is not closed"),
    ('"ab\\q"', 1, "unknown escape"),
    ("a.b.c(x)", 1, "no function of a configuration"),
    ("os.system([a])", 1, "no function of a configuration"),
    ("__import__(os)", 1, "no function of a configuration"),
    ("eval(x, [a])", 1, "no function of a configuration"),
    ("merge(ties, [a]).__class__", 17, "cannot stand here"),
    ("merge(ties, [a])(ties, [b])", 1, "only merge, stitch and route can be called"),
    ("[a, b]", 1, "a brick or a call"),
    ("(a, b)", 1, "a brick or a call"),
    ("()", 1, "a brick or a call"),
    ("a[b]", 1, "a brick or a call"),
    ("[x for x in y]", None, "cannot stand here"),
    ("[x async for x in y]", None, "cannot stand here"),
    ("lambda: 1", 7, "means nothing here"),
    ("{a: b}", 1, "means nothing here"),
    ("{*a}", 1, "means nothing here"),
    ("merge(ties, [*a])", 14, "means nothing here"),
    ("merge(ties, [a], **x)", 18, "means nothing here"),
    ("a if b else c", None, "cannot stand here"),
    ("a and b", None, "cannot stand here"),
    ("not a", None, "cannot stand here"),
    ("a := b", 3, "means nothing here"),
    ("x=1", None, "cannot stand here"),
    ("a == b", 1, "a brick or a call"),
    ("f'x'", None, "cannot stand here"),
    ("a; b", 2, "means nothing here"),
    ("`a`", 1, "means nothing here"),
    ("a # comment", 3, "means nothing here"),
    ("a\\\nb", 2, "means nothing here"),
    ("a\x00", 2, "means nothing here"),
    ("(" * 5000 + "a" + ")" * 5000, None, "nested too deeply"),
    ("stitch([" * 90 + "a" + "])" * 90, None, None),
    ("stitch([" * 5000 + "a" + "])" * 5000, None, "nested too deeply"),
    ("a" * 200_000, None, "more than the 100000 allowed"),
]


@pytest.mark.parametrize(("text", "at", "sentence"), REFUSED, ids=[r[0][:30] for r in REFUSED])
def test_what_is_refused_and_where(text, at, sentence):
    if sentence is None:
        parse(text)
        return
    with pytest.raises(UserError) as caught:
        parse(text)
    message = str(caught.value)
    assert sentence in message and len(message) < 400
    assert message.endswith((".", "?", "b]).")) and not message.endswith(("..", "?."))
    if at is not None:
        pointed = re.search(r"at character (\d+), ", message)
        assert pointed is not None and int(pointed[1]) == at, message


@given(st.text(max_size=40))
@example("_0")
@example("_0(_1, [_2])")
def test_any_text_is_read_or_refused_with_a_sentence(text):
    """No other exception, whatever is typed; what is read says the same when read again."""
    try:
        tree = parse(text)
    except UserError:
        return
    assert parse(str(tree)) == tree


PIECES = ["merge", "stitch", "route", "ties", "a", "b@1f", "(", ")", "[", "]", ",", "=", " ", "0.5",
          "weights", "true", '"x"', "'", ".", "-", "@", "*", "{", "\n", "lambda", "_1"]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
def test_any_mixture_of_its_own_pieces_too(text):
    test_any_text_is_read_or_refused_with_a_sentence.hypothesis.inner_test(text)
