"""Which of PEFT's tuners run as bricks, and which options they take: checked without torch.

A tuner is named as PEFT names its type, in small letters. Its options are the keys of PEFT's own
config class, read from PEFT's source; an option that is null is left to PEFT. What says where the
tuner sits is ours to set, from ``sites`` and ``layers``.
"""

from __future__ import annotations

import functools
import importlib.util
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cfm_train.errors import UserError, nearest
from cfm_train.library.peft_catalogue import config_fields
from cfm_train.library.peft_checks import DESCRIPTIVE, HARMLESS_INIT

#: Tuners that are kinds of our own, which share a forward with others.
OURS = {"lora": "lora", "ia3": "ia3"}

_OWN = "it is a kind of our own: choose brick={} instead"
#: Tuners that do not run as a brick of kind ``peft``, each with the reason.
REFUSED = {
    "prompt_tuning": _OWN.format("soft_prompt"),
    "prefix_tuning": _OWN.format("prefix"),
    "cartridge": _OWN.format("cartridge"),
    "cpt": "it needs the token ids of one fixed context: choose brick=soft_prompt",
    "multitask_prompt_tuning": "it needs a task id with every row: choose brick=soft_prompt",
    "adaption_prompt": "it rewrites the attention of a few architectures: choose brick=prefix",
    "lily": "its router averages over the batch, so a row's answer would depend on the others: "
    "choose brick=lora",
    "poly": "it needs a task id with every row: choose brick=lora, one for each task",
    "xlora": "it mixes LoRA adapters that exist already: train them with brick=lora",
    "osf": "it trains the weights themselves, about as many numbers as the sites hold: choose "
    "brick=lora with a high rank",
    "shadow": "it runs a second model beside the backbone: choose brick=lora",
    "trainable_tokens": "it trains single rows of the embedding: choose brick=soft_prompt",
}

#: Packages that a tuner needs beside PEFT, as they are imported and as they are installed.
NEEDS = {"adamss": ("sklearn", "scikit-learn")}

#: Keys of PEFT's configs that `sites`, `layers`, the backbone and the run decide.
DECIDED = DESCRIPTIVE | {
    "target_modules", "exclude_modules", "feedforward_modules", "layers_to_transform",
    "layers_pattern", "modules_to_save", "fan_in_fan_out", "rank_pattern", "total_step",
    "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
}  # fmt: skip

#: Keys by which an adapter changes the backbone itself, or acts outside of its layers, and why.
OUTSIDE = {
    "target_parameters": "replaces parameters of the backbone",
    "layer_replication": "repeats layers of the backbone",
    "trainable_token_indices": "trains rows of the backbone's embedding",
    "alora_invocation_tokens": "must know where in the text its adapter is called",
    "arrow_config": "chooses between several adapters",
    "megatron_config": "needs Megatron's layers",
    "use_asa": "keeps a state that a killed run would lose",
    "runtime_offload_base_weight": "moves weights of the backbone",
}

#: Keys that AdaLoRA's config takes over from LoRA's and uses; it would pass over the others.
_ADALORA_USES = {"lora_alpha", "lora_dropout", "init_lora_weights"}

_NAMES = {name: getattr(typing, name) for name in ("Any", "Literal", "Optional", "Union")}
_BUILTINS = {kind.__name__: kind for kind in (bool, dict, float, int, list, str, tuple)}


def check_tuner(tuner: str) -> None:
    """Refuses a tuner that cannot be trained as a brick of kind ``peft``.

    Raises:
        UserError: PEFT has no such tuner, or it does not run as a brick; with what to choose.
    """
    known = {name.lower() for name in config_fields()}
    if tuner in OURS:
        raise UserError(f"brick.tuner={tuner}: {_OWN.format(OURS[tuner])}.")
    if tuner in REFUSED:
        raise UserError(f"brick.tuner={tuner} does not run as a brick: {REFUSED[tuner]}.")
    if tuner not in known:
        hint = nearest(tuner, known - REFUSED.keys() - OURS.keys())
        raise UserError(f"brick.tuner: PEFT has no tuner '{tuner}'.{hint}")
    module, package = NEEDS.get(tuner, ("peft", "peft"))
    if importlib.util.find_spec(module) is None:
        raise UserError(f"brick.tuner={tuner} needs {package}: run pip install {package}.")


def check_options(tuner: str, options: Mapping[str, Any]) -> None:
    """Holds options against PEFT's config class of a tuner: their names and types.

    Raises:
        UserError: an option that PEFT does not know, that is not the person's to set, or of another
            type than PEFT's.
    """
    check_tuner(tuner)
    fields = config_fields()[tuner.upper()]
    for name, value in options.items():
        key = f"brick.options.{name}"
        if name in DECIDED and name in fields:
            raise UserError(
                f"{key} is set from brick.sites, brick.layers and the run: leave it out."
            )
        if name not in fields:
            hint = nearest(key, (f"brick.options.{n}" for n in fields.keys() - DECIDED))
            raise UserError(f"{key} is no option of PEFT's {tuner}.{hint}")
        if tuner == "adalora" and name in config_fields()["LORA"].keys() - _ADALORA_USES:
            raise UserError(f"{key} is a key of LoRA that PEFT's adalora ignores: leave it out.")
        if value is not None and not _fits(value, fields[name]):
            raise UserError(
                f"{key}={value!r} does not fit: PEFT's {tuner} takes {fields[name]} there."
            )
    if options.get("init_lora_weights") == "eva":
        raise UserError(
            "brick.options.init_lora_weights=eva needs a pass over the data before training, which "
            "is not made: choose true."
        )
    refuse_features(options, f"brick.tuner={tuner}")


def refuse_features(values: Mapping[str, Any], where: str) -> None:
    """Refuses what would move the backbone, or be ignored because it acts outside of PEFT's layers.

    Args:
        values: options, or the content of an ``adapter_config.json``.
        where: what to call the brick in the sentence.

    Raises:
        UserError: naming the feature.
    """
    init = values.get("init_lora_weights")
    if init not in HARMLESS_INIT or values.get("loftq_config"):
        raise UserError(
            f"{where} asks for init_lora_weights={init!r}, which rewrites the weights of the "
            "backbone itself: choose true, or convert the adapter to a plain LoRA in PEFT."
        )
    if values.get("bias") not in (None, "none"):
        raise UserError(
            f"{where} asks for bias={values['bias']}, which trains the biases of the backbone "
            "itself: choose none, or brick=bitfit."
        )
    for key, why in OUTSIDE.items():
        if values.get(key):
            raise UserError(f"{where} asks for {key}, which {why}: leave it out.")


def _fits(value: Any, annotation: str) -> bool:
    adapter = _adapter(annotation)
    if adapter is None:
        return True
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


@functools.cache
def _adapter(annotation: str) -> TypeAdapter[Any] | None:
    """What checks values of an annotation; None where it names a class of PEFT's own."""
    try:
        # The text is that of the installed PEFT's source; builtins are shut all the same.
        kind = eval(annotation, {"__builtins__": {}, **_BUILTINS, **_NAMES})
    except NameError:
        return None
    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
