"""Pinning: the same bricks for ever."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save

from cfm_train.configuration.parser import parse
from cfm_train.configuration.pin import pin
from cfm_train.errors import UserError
from cfm_train.library.card import Card
from cfm_train.library.store import Library


def add(library: Library, name: str, seed: int) -> Card:
    content = save({"a": np.random.default_rng(seed).normal(size=3).astype(np.float32)})
    return library.add({"brick.safetensors": content}, Card(name=name, kind="lora"))


def test_every_version_is_written_out(tmp_path):
    library = Library(tmp_path / "library")
    old, new, other = add(library, "a", 0), add(library, "a", 1), add(library, "b", 2)
    text = f"merge(ties, [a, a@{old.version[:4]}, stitch([b])], density=0.2)"
    pinned = pin(parse(text), library)
    stitched = f"stitch([{other.ref}], mode=chain)"
    assert str(pinned) == (
        f"merge(ties, [{new.ref}, {old.ref}, {stitched}], density=0.2, divisor=count, "
        "elect=total, equal=one, filters=null, fold=sqrt, normalize=false, rank=null, "
        "rescale=none, scale=1.0, scope=brick, seed=null, space=auto, sparsify=magnitude, "
        "weights=[1.0, 1.0, 1.0])"
    )
    assert pin(pinned, library) == pinned == parse(str(pinned))

    add(library, "a", 3)
    assert pin(pinned, library) == pinned, "a newer brick changes nothing that is pinned"
    assert pin(parse(text), library) != pinned
    assert pin(parse("b"), library) == parse(other.ref)


def test_a_brick_that_is_not_there(tmp_path):
    library = Library(tmp_path / "library")
    add(library, "sst2", 0)
    with pytest.raises(UserError, match=r"There is no 'sst3' .* Did you mean 'sst2'\?"):
        pin(parse("merge(ties, [sst2, sst3])"), library)
    with pytest.raises(UserError, match="No version of 'sst2' begins with"):
        pin(parse("sst2@" + "0" * 12), library)
