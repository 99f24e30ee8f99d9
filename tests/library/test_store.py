"""The library stores, finds and never changes: in a folder and behind fsspec alike."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from cfm_train.errors import UserError
from cfm_train.library.card import Card
from cfm_train.library.storage import open_storage
from cfm_train.library.store import Library


def test_version_is_the_hash_of_tensors_and_interface(local, bricks):
    """Against a second implementation, written down from the definition."""
    first = np.arange(6, dtype=np.float32).reshape(2, 3)
    second = np.array([1, 2], dtype=np.int64)
    interface = {"kind": "lora", "hyper": {"rank": 2}}
    heads = {"sst2": {"task": "classification", "labels": ["no", "yes"], "size": 2}}
    card = local.add(
        {
            "brick.safetensors": save({"b": first, "a": second}),
            "heads.safetensors": save({"a": second}),
        },
        bricks.card(
            interface=interface, heads=heads, sites=["layer.0.attn.q"], requires=["f" * 64]
        ),
    )

    expected = hashlib.sha256()
    for name, dtype, value in (
        ("brick.safetensors/a", "I64", second),
        ("brick.safetensors/b", "F32", first),
        ("heads.safetensors/a", "I64", second),
    ):
        line = json.dumps([name, dtype, list(value.shape)], separators=(",", ":"))
        expected.update(line.encode() + b"\n" + value.tobytes())
    identity = {
        "heads": heads,
        "interface": interface,
        "kind": "lora",
        "requires": ["f" * 64],
        "sites": ["layer.0.attn.q"],
    }
    expected.update(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode())
    assert card.version == expected.hexdigest()[:12]


def test_version_ignores_how_a_brick_came_to_be(library, bricks):
    value = np.ones(3, np.float32)
    one = library.add({"brick.safetensors": save({"a": value, "b": value})}, bricks.card("one"))
    two = library.add(
        {"brick.safetensors": save({"b": value, "a": value}, metadata={"format": "pt"})},
        bricks.card("two", recipe={"seed": 7}, metrics={"test/accuracy": {"value": 0.5}}, run="x"),
    )
    assert one.version == two.version
    assert library.verify() == []


@pytest.mark.parametrize(
    "change", ["value", "dtype", "shape", "name", "interface", "kind", "heads"]
)
def test_version_changes_with_what_the_brick_computes(local, bricks, change):
    base = bricks.card(interface={"alpha": 1})
    a = local.add({"brick.safetensors": save({"a": np.zeros(4, np.float32)})}, base)
    tensors = {
        "value": {"a": np.array([0, 0, 0, 1], np.float32)},
        "dtype": {"a": np.zeros(4, np.int32)},
        "shape": {"a": np.zeros((2, 2), np.float32)},
        "name": {"b": np.zeros(4, np.float32)},
    }.get(change, {"a": np.zeros(4, np.float32)})
    card = {
        "interface": dataclasses.replace(base, interface={"alpha": 2}),
        "kind": dataclasses.replace(base, kind="ia3"),
        "heads": dataclasses.replace(base, heads={"x": {"labels": ["p", "q"]}}),
    }.get(change, base)
    assert local.add({"brick.safetensors": save(tensors)}, card).version != a.version


def test_find_by_name_prefix_and_path(library, bricks):
    old, new = bricks.add(library, 0), bricks.add(library, 1)
    assert library.names() == ["sst2"]
    assert library.versions("sst2") == [old.version, new.version]
    assert library.find("sst2") == new
    assert library.find(old.ref) == old
    assert library.find(f"sst2@{old.version[:6]}") == old
    found = library.find(str(library.folder(old)))
    assert found == old and library.folder(found) == library.folder(old)
    assert (library.folder(found) / "brick.safetensors").read_bytes() == bricks.files(0)[
        "brick.safetensors"
    ]


def test_the_same_content_again_only_becomes_the_newest(library, bricks):
    first = bricks.add(library, 0, run="run one")
    bricks.add(library, 1)
    log = "sst2/refs.jsonl"
    assert len(library.storage.lines(log)) == 2
    card = library.storage.read(f"sst2/{first.version}/brick.json")

    again = bricks.add(library, 0, run="run two")
    assert again == first and again.run == "run one"
    assert library.storage.read(f"sst2/{first.version}/brick.json") == card
    assert library.find("sst2") == first
    assert [json.loads(line)["run"] for line in library.storage.lines(log)] == [
        "run one",
        "",
        "run two",
    ]

    bricks.add(library, 0)
    assert len(library.storage.lines(log)) == 3, "it is the newest already: no fourth line"


def test_the_order_of_lines_decides_not_the_clocks(local, bricks):
    a, b = bricks.add(local, 0), bricks.add(local, 1)
    log = Path(local.root) / "sst2" / "refs.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[1]["at"] = "1999-01-01T00:00:00.000000+00:00"  # a machine whose clock is wrong
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert local.versions("sst2") == [a.version, b.version]


def test_a_torn_line_harms_no_other(local, bricks):
    a = bricks.add(local, 0)
    log = Path(local.root) / "sst2" / "refs.jsonl"
    log.write_bytes(log.read_bytes() + b'{"version": "abc')
    b = bricks.add(local, 1)
    assert local.versions("sst2") == [a.version, b.version]
    assert log.read_bytes().splitlines()[1] == b'{"version": "abc'


def test_a_version_without_a_line_is_placed_by_its_card(local, bricks):
    """A writer can die between two of its steps; its artifact is whole and must be found."""
    a, b = bricks.add(local, 0), bricks.add(local, 1)
    log = Path(local.root) / "sst2" / "refs.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n")
    assert local.versions("sst2") == [a.version, b.version]
    log.unlink()
    assert local.versions("sst2") == [a.version, b.version]


def test_a_damaged_copy_is_repaired_by_adding_again(library, bricks):
    card = bricks.add(library, 0)
    path = f"sst2/{card.version}/brick.safetensors"
    library.storage.put(path, b"damaged")
    assert library.verify() != []
    assert bricks.add(library, 0).version == card.version
    assert library.verify() == []
    assert library.storage.read(path) == bricks.files(0)["brick.safetensors"]


def test_files_are_taken_from_paths_and_openers_too(library, bricks, tmp_path):
    content = bricks.files(3)["brick.safetensors"]
    (tmp_path / "x.safetensors").write_bytes(content)
    a = library.add({"brick.safetensors": tmp_path / "x.safetensors"}, bricks.card())
    b = library.add(
        {"brick.safetensors": lambda: (tmp_path / "x.safetensors").open("rb")}, bricks.card()
    )
    assert a == b == bricks.add(library, 3)
    with pytest.raises(UserError, match=r"There is no file .*y\.safetensors"):
        library.add({"brick.safetensors": tmp_path / "y.safetensors"}, bricks.card())


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "", ".", "..", "a/b", "a\\b", "a b", "a@b", "a..b", ".hidden", "-x", "x.",
     "ü", "stats", "a\n", "a" * 97, "$HOME", "a;b", "~"],
)  # fmt: skip
def test_a_name_cannot_climb_out(local, bricks, tmp_path, snapshot, name):
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="cannot name an artifact"):
        bricks.add(local, name=name)
    with pytest.raises(UserError, match=r"cannot name an artifact|There is no 'a'"):
        local.find(name)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["a", "A1", "my-brick", "20news", "a.b_c-d", "a" * 96, "sst2_"])
def test_ordinary_names_are_fine(local, bricks, name):
    assert bricks.add(local, name=name).name == name
    assert local.names() == [name]


def test_refs_that_mean_nothing_get_a_sentence(library, bricks):
    card = bricks.add(library, 0)
    for ref, sentence in (
        ("sts2", r"no 'sts2' in the library .* Did you mean 'sst2'\?"),
        ("sst2@", "after '@' comes the beginning of a version"),
        ("sst2@xyz", "after '@' comes the beginning of a version"),
        ("sst2@../x", "after '@' comes the beginning of a version"),
        ("sst2@" + ("0" if card.version[0] != "0" else "1"), "No version of 'sst2' begins with"),
    ):
        with pytest.raises(UserError, match=sentence):
            library.find(ref)


def test_an_ambiguous_prefix_gets_a_sentence(library, bricks):
    seen: dict[str, str] = {}
    for seed in range(40):  # 16 first digits: two versions soon share one
        version = bricks.add(library, seed).version
        if version[0] in seen:
            with pytest.raises(
                UserError, match=f"ambiguous: .*{seen[version[0]]}.*write more digits"
            ):
                library.find(f"sst2@{version[0]}")
            return
        seen[version[0]] = version
    pytest.fail("forty versions and no two begin alike")


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("weights.bin", "is a pickle or its kin"),
        ("weights.PT", "is a pickle or its kin"),
        ("code.py", "cannot be in an artifact"),
        ("../x.json", "cannot be a file of an artifact"),
        ("a/b.json", "cannot be a file of an artifact"),
        (".x.json", "cannot be a file of an artifact"),
    ],
)
def test_files_that_no_artifact_may_hold(local, bricks, tmp_path, snapshot, file, sentence):
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=sentence):
        local.add({**bricks.files(), file: b"{}"}, bricks.card())
    assert snapshot(tmp_path) == before


def test_a_card_round_trips_and_refuses_what_is_not_one(bricks):
    card = bricks.card(version="0123456789ab", parents=[{"name": "a", "version": "0" * 12}])
    assert Card.from_json(card.to_json(), "here") == card
    values = json.loads(card.to_json())
    for change, sentence in (
        ({"format": 2}, "card format 2"),
        ({"sights": []}, "unknown key 'sights'. Did you mean 'sites'?"),
        ({"sites": "layer.0"}, "'sites' must be list"),
        ({"name": "../x"}, "cannot name an artifact"),
        ({"version": "xyz"}, "is no version"),
        ({"granularity": "layers"}, "Did you mean 'layer'?"),
        ({"files": {"../../x": "0"}}, "cannot be a file of an artifact"),
        ({"parents": [{"name": "a"}]}, "must have a name and a version"),
        ({"parents": [{"name": "a", "version": "1f"}]}, "needs a full version"),
    ):
        with pytest.raises(UserError, match=sentence.replace("?", r"\?")):
            Card.from_json(json.dumps({**values, **change}), "here")
    for text in ("", "[]", "{", "\x00"):
        with pytest.raises(UserError, match="here is not a card"):
            Card.from_json(text, "here")
    del values["files"]
    with pytest.raises(UserError, match="lacks the key 'files'"):
        Card.from_json(json.dumps(values), "here")


def test_a_card_with_a_nan_is_refused(local, bricks):
    with pytest.raises(UserError, match="cannot be written as JSON"):
        bricks.add(local, metrics={"test/accuracy": {"value": float("nan")}})


def test_a_far_library_is_copied_once_and_checked(bricks, tmp_path):
    library = Library(f"memory://{tmp_path.name}/far")
    card = bricks.add(library, 0)
    folder = library.folder(card)
    assert folder.is_relative_to(tmp_path / "cache")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "brick.json",
        "brick.safetensors",
    ]
    library.storage.put(f"sst2/{card.version}/brick.safetensors", b"changed since")
    assert library.folder(card) == folder, "the copy stays as it was"
    other = bricks.add(library, 1)
    library.storage.put(f"sst2/{other.version}/brick.safetensors", b"changed before")
    with pytest.raises(UserError, match="has changed since"):
        library.folder(other)


def test_sidecars(library, bricks):
    card = bricks.add(library, 0)
    sidecar = library.sidecar(card, "d" * 64)
    assert sidecar.folder == f"stats/{card.version}/{'d' * 64}"
    assert sidecar.names() == [] and sidecar.read("fisher.json") is None
    sidecar.write("fisher.json", b"1")
    sidecar.write("fisher.json", b"2")
    sidecar.write("gram.safetensors", save({"gram": np.eye(2, dtype=np.float32)}))
    assert sidecar.names() == ["fisher.json", "gram.safetensors"]
    assert sidecar.read("fisher.json") == b"2"
    assert library.names() == ["sst2"], "the folder of sidecars is no brick"
    with pytest.raises(UserError, match="cannot be a file"):
        library.sidecar(card, "../../x")
    with pytest.raises(UserError, match="pickle"):
        sidecar.write("gram.pt", b"")


def test_an_address_that_nobody_knows():
    with pytest.raises(UserError, match="'nowhere://x' cannot be used"):
        Library("nowhere://x")


def test_storage_promises(tmp_path):
    """The same small contract, whatever the place."""
    for storage in (open_storage(tmp_path / "s"), open_storage(f"memory://{tmp_path.name}/s")):
        calls: list[str] = []
        one, two = partial(calls.append, "one"), partial(calls.append, "two")
        files = {"a.json": b"a", "z.json": b"z"}
        assert storage.commit("n/v", files, "a.json", one)
        assert not storage.commit("n/v", {"a.json": b"other"}, "a.json", two)
        assert calls == ["one", "two"]
        assert storage.entries("n/v") == ["a.json", "z.json"]
        assert storage.read("n/v/a.json") == b"a"
        assert storage.size("n/v/z.json") == 1
        assert 0 <= storage.age("n/v") < 60
        assert storage.entries("nothing") == [] and storage.lines("nothing.jsonl") == []
        storage.append("n/refs.jsonl", b"1", unless_last_has=b"1")
        storage.append("n/refs.jsonl", b"1", unless_last_has=b"1")
        storage.append("n/refs.jsonl", b"2", unless_last_has=b"2")
        storage.append("n/refs.jsonl", b"1", unless_last_has=b"1")
        assert [line.strip() for line in storage.lines("n/refs.jsonl")] == [b"1", b"2", b"1"]
        storage.remove("n/v")
        assert not storage.exists("n/v/a.json")
        with pytest.raises(FileNotFoundError):
            storage.read("n/v/a.json")


def test_removing_leaves_what_another_writer_puts_there_meanwhile(tmp_path, monkeypatch):
    storage = open_storage(f"memory://{tmp_path.name}/s")
    storage.commit("n/v", {"a.json": b"a", "z.json": b"z"}, "a.json", lambda: None)
    remove = storage.fs.rm_file

    def rm_file(path):
        remove(path)
        if path.endswith("z.json"):  # the last one
            storage.put("n/v/a.json", b"again")

    monkeypatch.setattr(storage.fs, "rm_file", rm_file)
    storage.remove("n/v")
    assert storage.read("n/v/a.json") == b"again" and not storage.exists("n/v/z.json")
    monkeypatch.undo()
    storage.remove("n/v")
    assert not storage.exists("n/v"), "an empty folder goes too"
