"""Which whole models are merged: found, and held against each other before torch is imported.

Models that are merged differ in their weights alone: every key of their configs that decides what
they compute, their tokenizers, the names, shapes and dtypes of their tensors are compared. What
differs is named, and nothing is read but headers (and tensors that are no numbers to be averaged).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from cfm_train.backbone.configs import FREE, differing
from cfm_train.backbone.fingerprint import fingerprint
from cfm_train.backbone.named import backbone_section, same_tokenizer
from cfm_train.backbone.spec import ResolvedBackbone, resolve
from cfm_train.backbone.tensors import Placed, placed_tensors
from cfm_train.errors import UserError
from cfm_train.library.tensorfile import BITS, pieces

#: Tensors that can be merged, by safetensors' word; what each is called in ``merge.dtype``.
FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
#: Config keys in which models that are merged may differ: those that change no output.
_MAY_DIFFER = FREE - {
    "architectures",
    "id2label",
    "label2id",
    "problem_type",
    "tie_word_embeddings",
}


@dataclass(frozen=True)
class Model:
    """A model whose tensors are merged.

    Attributes:
        label: how the person named it.
        backbone: its folder and config.
        tensors: where each of its tensors lies.
        fingerprint: hash of its files.
    """

    label: str
    backbone: ResolvedBackbone
    tensors: dict[str, Placed]
    fingerprint: str

    @property
    def name(self) -> str:
        """What a sentence calls it."""
        return self.backbone.id


@dataclass(frozen=True)
class Plan:
    """What becomes of every tensor.

    Attributes:
        merged: names of the tensors that are merged.
        copied: names of those that are no floating-point numbers and equal in all models.
        twins: name -> name of the tensor that it is tied to: both are the same numbers in every
            model, so they are merged once.
        dtypes: name -> dtype in the new model, safetensors' word, of every tensor.
    """

    merged: list[str]
    copied: list[str]
    twins: dict[str, str]
    dtypes: dict[str, str]

    def size(self, tensors: Mapping[str, Placed]) -> int:
        """Bytes of the new model's tensors."""
        bits = sum(
            BITS[dtype] * (8 * tensors[name].size // BITS[tensors[name].info.dtype])
            for name, dtype in self.dtypes.items()
        )
        return bits // 8


def open_model(label: str) -> Model:
    """Finds a model and its tensors.

    Raises:
        UserError: it is not there, or its files are damaged.
    """
    backbone = resolve(backbone_section(label))
    return Model(label, backbone, placed_tensors(backbone), fingerprint(backbone.folder))


def plan(models: Sequence[Model], dtype: str | None) -> Plan:
    """Holds models against each other, and says what becomes of their tensors.

    Args:
        models: at least one, the base among them where there is one; the first is the measure.
        dtype: of the new model's floating-point tensors; None for that of the inputs.

    Raises:
        UserError: the first difference that forbids merging them.
    """
    first = models[0]
    for other in models[1:]:
        _same_config(first, other)
        same_tokenizer(first.backbone, other.backbone)
        _same_tensors(first, other)
    merged: list[str] = []
    copied: list[str] = []
    for name, placed in first.tensors.items():
        (merged if placed.info.dtype in FLOATS else copied).append(name)
    dtypes = {name: _dtype(name, models, dtype) for name in merged}
    for name in copied:
        _refuse_other_bytes(name, models)
        dtypes[name] = first.tensors[name].info.dtype
    return Plan(merged, copied, _twins(models), dtypes)


def _same_config(one: Model, other: Model) -> None:
    a, b = one.backbone.config, other.backbone.config
    for model in (one, other):
        if model.backbone.config.get("quantization_config"):
            raise UserError(
                f"'{model.name}' is quantised, and its stored numbers cannot be averaged: merge "
                "models in float32, bfloat16 or float16."
            )
    if a["model_type"] != b["model_type"]:
        raise UserError(
            f"'{one.name}' is a {a['model_type']} and '{other.name}' a {b['model_type']}: only "
            "models of one architecture have the same tensors."
        )
    for key, mine, theirs in differing(a, b, one.backbone.folder, other.backbone.folder):
        if key not in _MAY_DIFFER and "drop" not in key:
            raise UserError(
                f"'{one.name}' and '{other.name}' differ in '{key}' of their config.json ({mine} "
                f"and {theirs}): models that are merged differ in their weights alone."
            )


def _same_tensors(one: Model, other: Model) -> None:
    names = one.tensors.keys() ^ other.tensors.keys()
    if names:
        name = min(names)
        has, lacks = (one, other) if name in one.tensors else (other, one)
        raise UserError(
            f"'{has.name}' has the tensor '{name}' and '{lacks.name}' has not: save both with the "
            "same class of model, and both with tied weights or neither."
        )
    for name, placed in one.tensors.items():
        mine, theirs = placed.info.shape, other.tensors[name].info.shape
        if mine != theirs:
            raise UserError(
                f"'{name}' has the shape {list(mine)} in '{one.name}' and {list(theirs)} in "
                f"'{other.name}': only tensors of one shape can be merged."
            )


def _dtype(name: str, models: Sequence[Model], wanted: str | None) -> str:
    """The dtype of a merged tensor."""
    if wanted is not None:
        return next(word for word, dtype in FLOATS.items() if dtype == wanted)
    found = {model.tensors[name].info.dtype: model for model in models}
    if len(found) > 1:
        (a, one), (b, other), *_ = found.items()
        raise UserError(
            f"'{name}' is {FLOATS.get(a, a)} in '{one.name}' and {FLOATS.get(b, b)} in "
            f"'{other.name}': say which the merged model gets, merge.dtype={FLOATS.get(a, a)}."
        )
    return next(iter(found))


def _refuse_other_bytes(name: str, models: Sequence[Model]) -> None:
    """Numbers that are no weights (positions, masks) can only be carried."""
    first = models[0]
    for other in models[1:]:
        if not _equal(first.tensors[name], other.tensors[name]):
            dtype = first.tensors[name].info.dtype
            raise UserError(
                f"'{name}' ({dtype}) differs between '{first.name}' and '{other.name}', and "
                "numbers of that type cannot be averaged."
            )


def _equal(one: Placed, other: Placed) -> bool:
    if one.info.dtype != other.info.dtype or one.size != other.size:
        return False
    if one == other:
        return True
    with one.file.open("rb") as a, other.file.open("rb") as b:
        return all(x == y for x, y in zip_longest(pieces(a, one.info), pieces(b, other.info)))


def _twins(models: Sequence[Model]) -> dict[str, str]:
    """Tensors that a file holds twice because they are tied: an embedding that is the head too.

    transformers stores tied tensors once; other programs write them out under each name.

    Raises:
        UserError: the config says that they are tied, and they are in some of the models only.
    """
    first = models[0]
    config: dict[str, Any] = first.backbone.config
    if not config.get("tie_word_embeddings", False):
        return {}
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, placed in sorted(first.tensors.items()):
        if len(placed.info.shape) == 2 and placed.info.shape[0] == config.get("vocab_size"):
            by_shape.setdefault(placed.info.shape, []).append(name)
    found = {}
    for known, *others in by_shape.values():
        for name in others:
            equal = [_equal(model.tensors[known], model.tensors[name]) for model in models]
            if not any(equal):
                continue  # another tensor that happens to have the shape
            if not all(equal):
                raise UserError(
                    f"The word embeddings are tied, but '{known}' and '{name}' differ in "
                    f"'{models[equal.index(False)].name}': save it with tied weights, or set "
                    "tie_word_embeddings to false in all of the models."
                )
            found[name] = known
    return found
