"""What connector and encoder must agree in, checked from their sections alone, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cfm_train.errors import UserError
from cfm_train.modality.series import read_series
from cfm_train.modality.table import Columns

#: How configs of transformers call the number of layers.
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


def check_fit(
    connector: Mapping[str, Any], encoder: Mapping[str, Any], backbone: Mapping[str, Any]
) -> None:
    """Refuses sections of which it is known already that they do not fit.

    Args:
        connector: the ``connector`` section.
        encoder: the ``encoder`` section.
        backbone: the language model's ``config.json``.

    Raises:
        UserError: layers that the backbone has none of, heads that do not divide a width, patches
            that do not divide an image or pass over steps, columns that are none, a factor that
            does not divide the encoder's grid.
    """
    if "heads" in connector:
        check_heads(connector["inner"], connector["heads"])
    layers = next((backbone[key] for key in LAYERS if key in backbone), None)
    if "every" in connector and "layers" not in connector and isinstance(layers, int):
        check_layers(connector["every"], layers)  # of the backbone, not of its own
    if "stride" in encoder:
        check_stride(encoder["patch"], encoder["stride"])
    if "texts" in encoder:
        check_columns(encoder["numbers"], encoder["texts"], encoder["ignored"])
    n = vectors(encoder)
    if "factor" in connector and n is not None:
        grid_side(n, connector["factor"])


def check_item(encoder: Mapping[str, Any], content: bytes, at: str) -> None:
    """Refuses an item that the encoder cannot read, where that can be told without torch.

    Args:
        encoder: the ``encoder`` section.
        content: the item's bytes.
        at: where it stands, for the error sentence.

    Raises:
        UserError: it is no series or no row of a table, or another one than the encoder reads.
    """
    if "stride" in encoder:
        read_series(content, at, encoder["channels"])
    if "texts" in encoder:
        numbers = dict(encoder["numbers"] or {})
        texts, ignored = list(encoder["texts"]), list(encoder["ignored"])
        Columns(numbers, texts, ignored, encoder["buckets"]).read(content, at)


def check_layers(every: int, layers: int) -> None:
    """Layers of the backbone that a connector acts behind.

    Raises:
        UserError: there are none.
    """
    if every > layers:
        raise UserError(
            f"connector.every={every} chooses no layer of the {layers} that the backbone has: give "
            "a smaller number."
        )


def check_heads(inner: int, heads: int) -> None:
    """Heads of one width each.

    Raises:
        UserError: they do not divide the width.
    """
    if inner % heads:
        raise UserError(f"connector.inner={inner} is no multiple of connector.heads={heads}.")


def check_stride(patch: int, stride: int) -> None:
    """Patches that leave out no step.

    Raises:
        UserError: they do.
    """
    if stride > patch:
        raise UserError(f"encoder.stride={stride} passes over steps: encoder.patch={patch}.")


def check_columns(
    numbers: Mapping[str, Sequence[float]] | None, texts: Sequence[str], ignored: Sequence[str]
) -> None:
    """Columns of a table, each with one part to play.

    Raises:
        UserError: there are none, a range is none, or one is named twice.
    """
    numbers = numbers or {}
    if not numbers and not texts:
        raise UserError(
            "encoder.numbers and encoder.texts are empty: name the columns that are read, such "
            "as encoder.numbers={age:[0,100]} encoder.texts=[town]."
        )
    for name, ends in numbers.items():
        if len(ends) != 2 or not ends[0] < ends[1]:
            raise UserError(
                f"encoder.numbers: the range of '{name}' is [low, high], found {list(ends)}."
            )
    named = [*numbers, *texts, *ignored]
    twice = [name for name in named if named.count(name) > 1]
    if twice:
        raise UserError(f"encoder: the column '{twice[0]}' is named twice.")


def grid_side(n: int, factor: int) -> int:
    """The side of a square grid of n vectors.

    Raises:
        UserError: it is none, or the factor does not divide it.
    """
    side = math.isqrt(n)
    if side * side != n or side % factor:
        raise UserError(
            f"connector.factor={factor}: an item has {n} feature vectors, which is no "
            "square grid with sides that it divides; choose another factor, or "
            "encoder.pool=none."
        )
    return side


def vectors(encoder: Mapping[str, Any]) -> int | None:
    """How many feature vectors every item has; None where only the items or the model tell."""
    if encoder.get("pool") == "mean" and "size" in encoder:  # of an image
        return 1
    if "size" in encoder and "patch" in encoder:
        if encoder["size"] % encoder["patch"]:
            size, patch = encoder["size"], encoder["patch"]
            raise UserError(f"encoder.size={size} is no multiple of encoder.patch={patch}.")
        return int(encoder["size"] // encoder["patch"]) ** 2
    return None
