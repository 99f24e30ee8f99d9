"""Series, tables and code of one's own as encoders: values, who they are, and what is refused."""

from __future__ import annotations

import datetime
import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cfm_train.errors import UserError
from cfm_train.modality.encoding import control, shuffled
from cfm_train.modality.finding import find_encoder
from cfm_train.modality.fitting import check_fit
from cfm_train.modality.forms import rows_of
from cfm_train.modality.items import Reader, check_items
from cfm_train.modality.series import read_series
from cfm_train.modality.targets import find_target

SERIES = {"kind": "series", "channels": 2, "patch": 4, "stride": 3}
TABLE = {
    "kind": "table", "numbers": {"age": [0, 100], "height": [1, 2]}, "texts": ["town"],
    "ignored": ["id"], "buckets": 8, "each": "row",
}  # fmt: skip
OWN = """
import torch
import numpy as np
from os.path import join

short = lambda content: [1.0, 2.0]

def length(content):
    return np.array([len(content), 1.0])

def halves(image):
    return image.reshape(2, -1)[:, :2] / 255

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.map = torch.nn.Linear(1, 2)

    def forward(self, series):
        return self.map(series)

made = Net()
number = 3
"""


def npy(values: Any) -> bytes:
    """The bytes of an array's file."""
    stream = io.BytesIO()
    np.save(stream, np.asarray(values, np.float32))
    return stream.getvalue()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of a person's own."""
    (tmp_path / "own_features.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    sys.modules.pop("own_features", None)
    return tmp_path / "own_features.py"


def target(name: str, reads: str = "bytes", **more: Any) -> dict[str, Any]:
    """A section of ``encoder=callable``."""
    base = {"kind": "callable", "target": f"own_features.{name}", "modality": "thing"}
    return base | {"reads": reads, "channels": 1, "numbers": 2, **more}


def test_a_series_is_the_same_from_npy_csv_and_a_row() -> None:
    values = np.array([[1, 2], [3, 5], [4, 4.5]], np.float32)
    text = "rise,fall\n" + "\n".join(",".join(map(str, line)) for line in values)
    for content in (npy(values), text.encode(), json.dumps(values.tolist()).encode()):
        np.testing.assert_array_equal(read_series(content, "here", 2), values)
    np.testing.assert_array_equal(read_series(b"[1, 2]", "here", 1), [[1], [2]])
    np.testing.assert_array_equal(read_series(b"1\n2\n", "here", 1), [[1], [2]])
    for broken, complaint in (
        (b"[[1, 2], [3]]", "is no series of numbers"),
        (b"1,a\n2,3", "is no series of numbers"),
        (b"\xff\xfe", "is no series of numbers"),
        (b"\x93NUMPY broken", "is no series of numbers"),
        (b"[1, NaN]", "finite numbers"),
        (b"[1, 1e39]", "finite numbers"),  # float32 ends at 3.4e38
        (b",\n1,2", "is no series of numbers"),  # a step without values is no line of names
        (b"[]", "finite numbers"),
        (b"[1, 2]", "1 channels, and encoder.channels=2"),
    ):
        with pytest.raises(UserError, match=f"^here: .*{complaint}"):
            read_series(broken, "here", 2)


@pytest.mark.parametrize("steps", [2, 4, 9, 10])
def test_patches_of_a_series_by_a_loop(steps: int) -> None:
    """Whatever its length, each step stands in a patch; height and spread are told apart."""
    series = np.random.default_rng(steps).normal(7, 3, (steps, 2))
    encoder = find_encoder(SERIES).open()
    features, mask = encoder.encode([encoder.load(npy(series), "here")])
    mean, deviation = series.mean(0), series.std(0)
    starts = [0]
    while starts[-1] + 4 < steps:
        starts.append(starts[-1] + 3)
    assert features.shape == (1, len(starts), encoder.width) and bool(mask.all())
    for found, start in zip(features[0], starts, strict=True):
        places = [min(step, steps - 1) for step in range(start, start + 4)]
        patch = ((series[places] - mean) / deviation).T.ravel()
        expected = np.concatenate([patch, np.arcsinh(mean), np.log(deviation)])
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    flat = encoder.encode([encoder.load(npy(np.ones((5, 2))), "here")])[0]
    assert bool(flat.isfinite().all())
    with pytest.raises(UserError, match=r"encoder\.stride=5 passes over steps"):
        find_encoder({**SERIES, "stride": 5}).open()


def test_a_patchtst_is_transformers_own(tmp_path: Path) -> None:
    """Long series by their end, short ones beside what was not observed; nothing is masked."""
    from transformers import PatchTSTConfig, PatchTSTForPretraining, PatchTSTModel

    torch.manual_seed(0)
    config = PatchTSTConfig(
        num_input_channels=2, context_length=12, patch_length=4, patch_stride=4, d_model=8,
        num_attention_heads=2, num_hidden_layers=1, ffn_dim=8, scaling="std", do_mask_input=True,
        mask_type="random", random_mask_ratio=0.5,
    )  # fmt: skip
    PatchTSTForPretraining(config).save_pretrained(tmp_path / "model")
    encoder = find_encoder({"kind": "patchtst", "path": str(tmp_path / "model"), "pool": "none"})
    ours = encoder.open()
    assert encoder.modality == "series" and ours.width == 10
    long, short = (torch.randn(steps, 2) * 3 + 1 for steps in (20, 8))
    features, mask = ours.encode([ours.load(npy(x), "here") for x in (long, short)])
    config.do_mask_input = False
    theirs = PatchTSTModel.from_pretrained(tmp_path / "model", config=config).eval()
    observed = torch.cat([torch.zeros(4, 2), torch.ones(8, 2)])
    values = torch.stack([long[-12:], torch.cat([torch.zeros(4, 2), short])])
    with torch.no_grad():
        output = theirs(values, torch.stack([torch.ones(12, 2), observed]))
    expected = output.last_hidden_state.flatten(1, 2)
    assert mask.shape == (2, 2 * 3) and bool(mask.all())
    torch.testing.assert_close(features[:, :, :8], expected, atol=1e-5, rtol=0)
    beside = features.view(2, 2, 3, 10)[..., 8:]
    told = [x.double() for x in (long[-12:], short)]
    mean = torch.stack([x.mean(0) for x in told]).asinh()
    spread = torch.stack([(x.var(0, correction=0) + 1e-5).sqrt() for x in told]).log()
    wanted = torch.stack([mean, spread], -1)[:, :, None].expand(2, 2, 3, 2).float()
    torch.testing.assert_close(beside, wanted, atol=1e-4, rtol=0)
    pooled = find_encoder({"kind": "patchtst", "path": str(tmp_path / "model"), "pool": "mean"})
    mean_of = pooled.open().encode([ours.load(npy(long), "here")])[0]
    torch.testing.assert_close(mean_of[0], features[0].view(2, 3, 10).mean(1), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=r"1 channels, and the model of encoder\.path reads 2"):
        ours.load(b"[1, 2]", "here")


def test_a_tables_row_by_hand() -> None:
    encoder = find_encoder(TABLE).open()

    def of(**row: Any) -> np.ndarray:
        features, mask = encoder.encode([encoder.load(json.dumps(row).encode(), "here")])
        assert bool(mask.all())
        return features[0].numpy()

    found = of(age=25, height=2.5, town="Ulm", id="x")
    assert found.shape == (1, 2 + 2 + 8 + 1)
    np.testing.assert_allclose(found[0, :4], [-0.5, 0, 2, 0])
    assert np.linalg.norm(found[0, 4:12]) == pytest.approx(1) and found[0, 12] == 0
    np.testing.assert_array_equal(of(town="ulm", height="2.5", age="25"), found)
    assert not np.array_equal(of(age=25, height=2.5, town="Bonn"), found)
    missing = of(age=None)
    np.testing.assert_array_equal(missing[0], [0, 1, 0, 1, *[0] * 8, 1])
    columns = find_encoder({**TABLE, "each": "column"}).open()
    each, _ = columns.encode([columns.load(b'{"age": 25, "height": 2.5, "town": "Ulm"}', "x")])
    assert each.shape == (1, 3, 3 + 9)
    np.testing.assert_array_equal(each[0, :, :3], np.eye(3))
    np.testing.assert_allclose(each[0, 0, 3:5], [-0.5, 0])
    np.testing.assert_allclose(each[0, 2, 3:], found[0, 4:])
    for broken, complaint in (
        (b'{"agee": 3}', r"does not read the column 'agee'\. Did you mean 'age'"),
        (b'{"age": "old"}', r"the column 'age' must be a number, found 'old'"),
        (b'{"town": ["Ulm"]}', r"the column 'town' must be a text"),
        (b"[1, 2]", "is a JSON object, found list"),
        (b"{", "is no JSON object"),
    ):
        with pytest.raises(UserError, match=f"^here: .*{complaint}"):
            encoder.load(broken, "here")
    for more, complaint in (
        ({"numbers": {}, "texts": []}, "name the columns"),
        ({"numbers": {"age": [3, 3]}}, r"range of 'age'"),
        ({"ignored": ["age"]}, "'age' is named twice"),
    ):
        with pytest.raises(UserError, match=complaint):
            find_encoder({**TABLE, **more}).open()


def test_hashing_is_what_it_was() -> None:
    """A change of the hash would make every table's brick read other features."""
    from cfm_train.modality.table import hashed

    assert hashed("", 4) == hashed("", 4)
    by_hand = [0.0] * 4
    import hashlib

    for piece in ("ulm", "<ul", "ulm", "lm>"):
        digest = hashlib.sha256(piece.encode()).digest()
        by_hand[int.from_bytes(digest[:8], "big") % 4] += 1 if digest[8] & 1 else -1
    length = np.linalg.norm(by_hand) or 1.0
    np.testing.assert_allclose(hashed("Ulm", 4), np.array(by_hand) / length)


def test_who_a_table_is_tells_its_columns() -> None:
    first = find_encoder(TABLE).fingerprint
    turned = {**TABLE, "numbers": {"height": [1, 2], "age": [0, 100]}}
    assert find_encoder(turned).fingerprint == first
    for more in ({"texts": ["city"]}, {"numbers": {"age": [0, 99]}}, {"buckets": 9}):
        assert find_encoder({**TABLE, **more}).fingerprint != first
    assert find_encoder(TABLE).modality == "table"


def test_code_of_ones_own_makes_features(own: Path) -> None:
    found = find_encoder(target("length"))
    encoder = found.open()
    assert found.modality == encoder.modality == "thing"
    features, mask = encoder.encode([encoder.load(b"abc", "here"), encoder.load(b"", "here")])
    assert features.tolist() == [[[3, 1]], [[0, 1]]] and bool(mask.all())
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    stream = io.BytesIO()
    np.save(stream, image)
    halves = find_encoder(target("halves", "image")).open()
    seen, _ = halves.encode([halves.load(stream.getvalue(), "here")])
    np.testing.assert_allclose(seen[0], np.array([[0, 1], [12, 13]]) / 255, atol=1e-6)
    for name in ("Net", "made"):
        net = find_encoder(target(name, "series")).open()
        out, there = net.encode([net.load(b"[1, 2, 3]", "x"), net.load(b"[4]", "x")])
        with torch.no_grad():
            expected = net.made(torch.tensor([[1.0], [2.0], [3.0]]))
        torch.testing.assert_close(out[0], expected)
        assert there.tolist() == [[True] * 3, [True, False, False]]
        assert not any(p.requires_grad for p in net.parameters())


def test_code_is_known_by_its_source_and_its_weights(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = find_encoder(target("length")).fingerprint
    assert find_encoder(target("length")).fingerprint == first
    net = find_encoder(target("Net", "series")).fingerprint
    assert find_encoder(target("Net", "series")).fingerprint == net  # its weights are drawn alike
    made = find_encoder(target("made", "series")).fingerprint
    module = importlib.import_module("own_features")
    with torch.no_grad():
        module.made.map.bias += 1
    assert find_encoder(target("made", "series")).fingerprint != made
    own.write_text(OWN.replace("1.0])", "2.0])"))
    assert find_encoder(target("length")).fingerprint != first


def test_code_is_known_by_the_modules_that_it_imports_too(own: Path) -> None:
    """Those of a person's own, however deep; neither installed ones nor ones beside it."""
    inner = own.parent / "inner"
    inner.mkdir()
    (inner / "__init__.py").write_text("")
    (inner / "first.py").write_text("from . import second\nfrom json import loads\n")
    (inner / "second.py").write_text("SCALE = 1.0\n")
    (inner / "apart.py").write_text("")
    own.write_text(f"{OWN}\nfrom inner.first import second\nimport own_features\n")
    known = find_target("own_features.length").source()
    assert sorted(known) == ["inner", "inner.first", "inner.second", "own_features"]
    first = find_encoder(target("length")).fingerprint
    (inner / "apart.py").write_text("SCALE = 3.0\n")
    assert find_encoder(target("length")).fingerprint == first
    (inner / "second.py").write_text("SCALE = 2.0\n")
    assert find_encoder(target("length")).fingerprint != first
    (inner / "third.py").write_text("from .second import SCALE\n\n\ndef of(content): ...\n")
    assert sorted(find_target("inner.third.of").source()) == ["inner.second", "inner.third"]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("short", "is a lambda"),
        ("join", "only imports 'join'"),
        ("lenght", r"defines no 'lenght'\. Did you mean 'length'"),
    ],
)
def test_what_has_no_source_is_refused(own: Path, name: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        find_encoder(target(name))


def test_what_cannot_be_called_is_refused(own: Path) -> None:
    with pytest.raises(UserError, match=r"is a int: give a function or an nn\.Module"):
        find_encoder(target("number"))
    with pytest.raises(UserError, match="there is no such module"):
        find_encoder({**target("x"), "target": "nowhere_at_all.x"})
    with pytest.raises(UserError, match="a module reads tensors"):
        find_encoder(target("Net")).open()
    wide = find_encoder(target("length", numbers=3)).open()
    with pytest.raises(UserError, match=r"^here: .* must give numbers \[n, 3\], found \(1, 2\)"):
        wide.load(b"abc", "here")
    failing = find_encoder(target("halves")).open()
    with pytest.raises(UserError, match=r"^here: .*halves failed \(AttributeError"):
        failing.load(b"abc", "here")


def test_items_that_stand_within_their_rows(tmp_path: Path) -> None:
    """A series of numbers or of channels is one item; a table's row is an object."""
    section = {"items": str(tmp_path / "rows.jsonl"), "validation": None, "test": None,
               "root": None, "text": "text", "prompt": "<item> is", "validation_fraction": 0.0,
               "test_fraction": 0.0, "limit": None}  # fmt: skip
    series = [[1, 2], [[1, 2], [3, 4]], [[[1, 2], [3, 4]], [[5, 6]]]]
    lines = [json.dumps({"series": one, "text": f"a{i}"}) for i, one in enumerate(series)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    rows = check_items(section, "series", "x")[0].rows["train"]
    counts = {row["answer"]: (len(row["_items"]), row["prompt"]) for row in rows}
    one, two = "<series> is", "<series><series> is"
    assert counts == {"a0": (1, one), "a1": (1, one), "a2": (2, two)}
    reader = Reader(None, tmp_path)
    held = {row["answer"]: [reader.read(item, "x") for item in row["_items"]] for row in rows}
    assert held["a1"] == [b"[[1,2],[3,4]]"] and held["a2"] == [b"[[1,2],[3,4]]", b"[[5,6]]"]
    (tmp_path / "rows.jsonl").write_text('{"table": {"b": 1, "a": 2}, "text": "c"}')
    (row,) = check_items(section, "table", "x")[0].rows["train"]
    assert row["_items"] == ['json:{"a":2,"b":1}']
    (tmp_path / "rows.csv").write_text("a,b,text\n2,,c\n")
    whole = section | {"items": str(tmp_path / "rows.csv")}
    (row,) = check_items(whole, "table", "x")[0].rows["train"]
    assert row["_items"] == ['json:{"a":"2","b":""}'] and row["answer"] == "c"
    parts = [{"type": "table", "table": {"a": 2}}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}))
    (row,) = check_items(section, "table", "x")[0].rows["train"]
    assert row["_items"] == ['json:{"a":2}']


def test_a_cell_that_is_no_json_is_refused() -> None:
    """Parquet has dates."""
    values = {"table": {"born": datetime.date(1990, 1, 1)}, "text": "w5"}
    with pytest.raises(
        UserError, match=r"^here: an item .* numbers and texts \(Object of type date"
    ):
        rows_of(values, "here", {"text": "text"}, ["table"])


def test_rows_swap_items_or_borrow_them() -> None:
    """Where no other row has as many items, they come from any other row."""
    rows: list[dict[str, Any]] = [
        {"_items": list(items), "_kinds": ["image"] * len(items), "text": [*items, "asked"]}
        for items in ("a", "b", "cd", "e")
    ]
    other = shuffled(rows, 0)
    assert [len(items) for items in other] == [1, 1, 2, 1]
    assert all(not set(new) & set(row["_items"]) for new, row in zip(other, rows, strict=True))
    assert control(rows, 0) == other
    assert control([rows[0], {**rows[0], "text": ["a", "asked otherwise"]}], 0) is None


@pytest.mark.parametrize(
    ("connector", "encoder", "complaint"),
    [
        ({"inner": 10, "heads": 4}, {}, "no multiple of connector.heads"),
        ({"factor": 2}, {"size": 128, "pool": "mean"}, "connector.factor=2: an item has 1 feature"),
        ({"factor": 3}, {"size": 32, "patch": 8}, "connector.factor=3: an item has 16 feature"),
        ({}, {"size": 30, "patch": 8}, "encoder.size=30 is no multiple"),
        ({"every": 3}, {}, "connector.every=3 chooses no layer of the 2"),
        ({}, SERIES | {"stride": 5}, "encoder.stride=5 passes over steps"),
        ({}, TABLE | {"numbers": {}, "texts": []}, "name the columns"),
    ],
)
def test_what_does_not_fit_is_said_before_torch(
    connector: dict[str, Any], encoder: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        check_fit(connector, encoder, {"num_hidden_layers": 2})
    check_fit({"factor": 2, "inner": 8, "heads": 4}, {"size": 32, "patch": 8}, {})
    check_fit({"every": 3, "layers": 4, "inner": 8, "heads": 4}, {}, {"num_hidden_layers": 2})
