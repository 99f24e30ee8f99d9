"""Free text in an override: what a person types is what the run gets."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from cfm_train.config.compose import compose, expand
from cfm_train.config.free_text import text_keys
from cfm_train.config.quoting import TextKind, decode, encode, quote, split
from cfm_train.errors import UserError

TRAIN = ["recipe=task/classify", "data.train=a.jsonl"]
EVALUATE = ["recipe=evaluate/tasks", "tasks=[sst2]"]
AWKWARD = [
    "1e5",
    "null",
    "true",
    "0x1F",
    "a, b",
    "it's {ok}",
    'say "hi"',
    "${name}",
    r"\${x} \\",
    " blanks ",
    "[a, b]",
    "choice(a,b)",
    "a=b",
    "line\nbreak",
    "ünïcode 漢字 🙂",
    "'quoted'",
    "",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_a_column_name_arrives_as_typed(text: str) -> None:
    config = compose([*TRAIN, "name=x", f"data.hub={text}"])
    assert config["data"]["hub"] == (None if text == "null" else text)


def test_names_that_look_like_numbers_stay_text() -> None:
    config = compose([*TRAIN, "name=1e5", "data.label=007"])
    assert config["name"] == "1e5"
    assert config["data"]["name"] == "1e5"  # through an interpolation in the YAML
    assert config["data"]["label"] == "007"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("bricks=[merge(ties,[a,b])]", ["merge(ties,[a,b])"]),
        ("bricks=[sst2@1f2c]", ["sst2@1f2c"]),
        ("bricks=[a, b]", ["a", "b"]),
        ("bricks=[]", []),
        ("bricks=mine", ["mine"]),
        (
            "bricks=merge(ties,[sst2, trec], density=0.2)",
            ["merge(ties,[sst2, trec], density=0.2)"],
        ),
        ("bricks=['a, b',\"c\"]", ["a, b", "c"]),
        ("bricks=[1e5,null]", ["1e5", "null"]),
    ],
)
def test_lists_of_texts(typed: str, meant: list[str]) -> None:
    assert compose([*EVALUATE, typed])["bricks"] == meant


def test_several_values_without_brackets_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"^bricks=a,b names several values: write bricks=\[a,b\]\.$"
    ):
        compose([*EVALUATE, "bricks=a,b"])


def test_a_key_that_takes_one_text_or_several() -> None:
    assert compose([*TRAIN, "name=x", "data.text=a"])["data"]["text"] == "a"
    assert compose([*TRAIN, "name=x", "data.text=[a,b]"])["data"]["text"] == ["a", "b"]


def test_a_brick_parameter_that_is_a_list_of_texts() -> None:
    config = compose([*TRAIN, "name=x", "brick.sites=[attn.*, ffn.down]", "brick.rank=4"])
    assert config["brick"]["sites"] == ["attn.*", "ffn.down"]
    assert config["brick"]["rank"] == 4


def test_texts_are_swept_over_with_m() -> None:
    jobs = expand([*TRAIN, "name=a,1e5", "data.text=[x,y],z", "seed=1"])
    found = [decode(job) for job in jobs]
    assert [job[2:4] for job in found] == [
        ["++name=a", "++data.text=[x,y]"],
        ["++name=a", "++data.text=z"],
        ["++name=1e5", "++data.text=[x,y]"],
        ["++name=1e5", "++data.text=z"],
    ]


def test_prose_is_never_swept_over() -> None:
    kinds = {"prompt": TextKind(prose=True)}
    quoted = quote("prompt=a, b", kinds, sweep=True)
    assert decode(quoted) == "prompt=a, b"
    assert "," not in quoted


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_every_text_survives(text: str) -> None:
    try:
        token = encode(text)
    except UnicodeEncodeError:
        return  # half of a surrogate pair, which no terminal can send
    assert decode(token) == text
    assert decode({"a": [f"<{token}>"], token: 1}) == {"a": [f"<{text}>"], text: 1}


@given(st.text())
def test_hydra_reads_a_quoted_text_as_one_plain_value(text: str) -> None:
    quoted = quote(f"name={text}", text_keys())
    override = OverridesParser.create().parse_override(quoted)
    assert not override.is_sweep_override()
    assert decode(override.value()) == text


@given(st.lists(st.text(alphabet="ab (]'1", min_size=1).map(str.strip).filter(bool)))
def test_split_undoes_join_of_bracketed_parts(parts: list[str]) -> None:
    wrapped = [f"f({part.replace('(', '').replace(']', '')}, [x])" for part in parts]
    assert split(", ".join(wrapped)) == (wrapped or [""])
