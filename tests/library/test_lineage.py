"""Lineage: from the cards alone, also where a parent is gone or stands in its own tree."""

from __future__ import annotations

import pytest

from cfm_train.errors import UserError


def parent(card):  # type: ignore[no-untyped-def]
    return {"name": card.name, "version": card.version}


def test_the_whole_tree(library, bricks):
    a, b = bricks.add(library, 0, "a"), bricks.add(library, 1, "b")
    ab = bricks.add(library, 2, "ab", parents=[parent(a), parent(b)], expression="merge(...)")
    top = bricks.add(library, 3, "top", parents=[parent(ab), parent(a)])
    bricks.add(library, 4, "a")  # a newer version of a parent changes nothing

    node = library.lineage("top")
    assert [one.ref for one in node.walk()] == [top.ref, ab.ref, a.ref, b.ref, a.ref]
    tree = node.to_dict()
    assert tree["parents"][0] == {
        "name": "ab",
        "version": ab.version,
        "present": True,
        "kind": "lora",
        "operation": "train",
        "expression": "merge(...)",
        "parents": [one.to_dict() for one in library.lineage("ab").parents],
    }


def test_a_parent_that_is_gone_is_still_named(library, bricks):
    a = bricks.add(library, 0, "a")
    bricks.add(library, 1, "child", parents=[parent(a)])
    with pytest.raises(UserError, match=f"{a.ref} is a parent of child@.*--force"):
        library.remove("a")
    assert library.remove("a", force=True) == a.ref
    (gone,) = library.lineage("child").parents
    assert gone.ref == a.ref and gone.card is None and gone.parents == []
    assert gone.to_dict()["present"] is False


def test_a_brick_in_its_own_tree_does_not_loop(library, bricks):
    """A merge with weight 1 on one brick is that brick: same tensors, same version, same name."""
    first = bricks.add(library, 0, "a")
    library.remove(first.ref)
    again = bricks.add(library, 0, "a", parents=[parent(first)])
    assert again.ref == first.ref
    assert [one.ref for one in library.lineage("a").walk()] == [first.ref, first.ref]
    assert library.remove("a") == first.ref, "it is no child of itself"


def test_remove_wants_to_know_which_version(library, bricks):
    one, two = bricks.add(library, 0), bricks.add(library, 1)
    with pytest.raises(UserError, match=f"has 2 versions .*{one.version}.*write which one"):
        library.remove("sst2")
    assert library.remove(f"sst2@{one.version[:5]}") == one.ref
    assert library.versions("sst2") == [two.version]
    assert library.remove("sst2") == two.ref
    assert library.names() == []
    with pytest.raises(UserError, match="There is no 'sst2'"):
        library.remove("sst2")
    assert bricks.add(library, 0).version == one.version, "what was removed can come back"
    assert library.find("sst2").version == one.version
