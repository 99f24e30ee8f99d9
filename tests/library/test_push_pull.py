"""Push and pull: through a plain folder for real, and one sentence where there is no network."""

from __future__ import annotations

import pytest

from cfm_train.errors import UserError
from cfm_train.library import folders, hub
from cfm_train.library.store import Library


def test_a_brick_goes_through_a_folder_unchanged(library, bricks, tmp_path, snapshot):
    card = bricks.add(
        library, 0, heads={"sst2": {"labels": ["a", "b"]}}, recipe={"seed": 1}, run="r"
    )
    folders.push(library, card, tmp_path / "box")
    assert sorted(snapshot(tmp_path / "box")) == ["README.md", "brick.json", "brick.safetensors"]

    other = Library(tmp_path / "other")
    pulled = folders.pull(other, tmp_path / "box")
    assert pulled == card
    assert snapshot(other.folder(pulled)) == snapshot(tmp_path / "box")
    assert other.verify() == []
    renamed = folders.pull(other, tmp_path / "box", "copy")
    assert renamed.ref == f"copy@{card.version}" and other.names() == ["copy", "sst2"]


def test_a_folder_that_was_changed_on_the_way_is_refused(local, bricks, tmp_path, snapshot):
    card = bricks.add(local, 0, interface={"alpha": 1})
    other = Library(tmp_path / "other")
    for number, (file, old, new, sentence) in enumerate(
        (
            ("brick.safetensors", b"down", b"dawn", "has changed since"),
            ("README.md", b"# sst2", b"# sst3", "has changed since"),
            ("brick.json", b'"alpha": 1', b'"alpha": 2', "but its tensors and interface give"),
            ("brick.json", b'"format": 1', b'"format": 9', "card format 9"),
            ("brick.json", card.name.encode() + b'"', b'../x"', "cannot name an artifact"),
        )
    ):
        box = tmp_path / f"box{number}"
        folders.push(local, card, box)
        content = (box / file).read_bytes()
        assert old in content
        (box / file).write_bytes(content.replace(old, new))
        with pytest.raises(UserError, match=sentence):
            folders.pull(other, box)
    assert other.names() == []


def test_folders_that_cannot_be_used(local, bricks, tmp_path):
    card = bricks.add(local)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(UserError, match="is not an empty folder"):
        folders.push(local, card, tmp_path / "full")
    with pytest.raises(UserError, match="is not an empty folder"):
        folders.push(local, card, tmp_path / "full" / "mine")
    with pytest.raises(UserError, match="holds no artifact"):
        folders.pull(local, tmp_path / "full")
    with pytest.raises(UserError, match="holds no artifact"):
        folders.pull(local, tmp_path / "gone")
    assert (tmp_path / "full" / "mine").read_text() == "x"


def test_a_damaged_brick_is_not_handed_on(local, bricks, tmp_path):
    card = bricks.add(local)
    (local.folder(card) / "brick.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="has changed since"):
        folders.push(local, card, tmp_path / "box")
    assert not (tmp_path / "box").exists()


@pytest.mark.parametrize(
    ("place", "is_hub"),
    [
        ("someone/brick", True),
        ("./someone/brick", False),
        ("../brick", False),
        ("~/brick", False),
        ("/a/b", False),
        ("brick", False),
        ("a/b/c", False),
        ("a/", False),
    ],
)
def test_what_means_the_hub(place, is_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_hub_id(place) is is_hub
    if is_hub:
        (tmp_path / place).mkdir(parents=True)
        assert not hub.is_hub_id(place), "a folder that is there comes first"


def test_no_network_is_one_sentence(local, bricks):
    """The suite runs with HF_HUB_OFFLINE: the Hub's own client then refuses every call."""
    card = bricks.add(local)
    with pytest.raises(UserError, match="'someone/brick' could not be reached") as caught:
        hub.push_to_hub(local, card, "someone/brick", private=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="'someone/brick' could not be reached") as caught:
        hub.pull_from_hub(local, "someone/brick", revision=None, name=None)
    assert "\n" not in str(caught.value)
