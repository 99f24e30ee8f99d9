"""Make a backbone from whole models of one shape, and write it as a transformers model folder.

check    configs, tokenizers, headers, weights, the disk, all before torch is imported
run      models merged piece by piece ─► card, record

The weights lie in ``out``; the library holds the card, with what the model was made from, and
``merge.json``, which the folder holds too.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.backbone.folders import check_room, look_at
from cfm_train.backbone.sites import fits
from cfm_train.backbone.tensors import content_of, stacks_of
from cfm_train.config import merging, signature
from cfm_train.errors import UserError, nearest
from cfm_train.library.card import check_name
from cfm_train.library.store import Library
from cfm_train.merging.models.sources import Model, Plan, open_model, plan
from cfm_train.merging.sidecars import needed_by
from cfm_train.merging.weights import Weights, check_filters, check_weights
from cfm_train.operations.made_backbone import record_backbone
from cfm_train.tracking.wandb_setting import resolve_mode

if TYPE_CHECKING:
    from cfm_train.merging.models.task import Task

MERGE_FILE = "merge.json"


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        models: what is merged.
        base: what their updates are differences to; None for a rule that takes parameters.
        plan: what becomes of every tensor.
        weights: by name of the tensor.
        parameters: of the merge, without those of whole models alone.
        library: where the card will go.
        out: the folder to write.
        merge: the content of ``merge.json``: what decides the model.
        written: whether an earlier start of this run has written the folder.
        fingerprints: content hashes for the config hash.
    """

    models: list[Model]
    base: Model | None
    plan: Plan
    weights: Weights
    parameters: dict[str, Any]
    library: Library
    out: Path
    merge: str
    written: bool
    fingerprints: dict[str, str]

    @property
    def companion(self) -> Model:
        """The model whose config and tokenizer the new one gets."""
        return self.base or self.models[0]


def check(config: dict[str, Any]) -> Inputs:
    """Checks everything that can be checked without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_name(config["name"])
    resolve_mode(config["tracking"]["mode"])
    parameters = {key: value for key, value in config["merge"].items() if key != "dtype"}
    if parameters["seed"] is None:
        parameters["seed"] = config["seed"]
    rule, count = parameters["rule"], len(config["models"])
    check_choices(parameters, config["base"] is not None)
    merging.check_count(rule, count, "models")
    given = merging.default_weights(config["weights"], count, parameters["equal"], rule)
    checked = check_weights(given, count)
    filters = check_filters(parameters["filters"], count)
    opened: dict[str, Model] = {}
    for label in [*([config["base"]] if config["base"] else []), *config["models"]]:
        if label not in opened:
            opened[label] = open_model(label)
    models = [opened[label] for label in config["models"]]
    base = opened[config["base"]] if config["base"] else None
    todo = plan(list(opened.values()), config["merge"]["dtype"])
    layers = {f"{stack}.": count for stack, count in stacks_of(models[0].tensors).items()}
    weights = Weights(checked, filters, layers or {"": 1}, parameters["normalize"])
    _check_everywhere(weights, todo.merged)
    merge = {
        "models": [_named(model) for model in models],
        "base": None if base is None else _named(base),
        "weights": given if parameters["equal"] is not None else None,
        "merge": config["merge"] | {"seed": parameters["seed"]},
    }
    text = json.dumps(merge, indent=2, sort_keys=True) + "\n"
    out = Path(config["out"]).expanduser().absolute()
    written = look_at(out, MERGE_FILE, text)
    if not written:
        check_room(out, todo.size(models[0].tensors), "the merged model")
    library = Library(config["library"])
    library.check_writable()
    fingerprints = {f"backbone/{label}": model.fingerprint for label, model in opened.items()}
    return Inputs(
        models, base, todo, weights, parameters, library, out, text, written, fingerprints
    )


def check_choices(parameters: Mapping[str, Any], has_base: bool) -> None:
    """Refuses a rule, space or sparsifier that whole models do not go with.

    Raises:
        UserError: saying what else there is.
    """
    rule, space = parameters["rule"], parameters["space"]
    statistic = needed_by(rule)
    if statistic is not None:
        raise UserError(
            f"rule={rule} goes by {statistic} statistics, which are gathered for bricks alone: "
            "merge whole models by another rule, such as rule=linear or rule=ties."
        )
    if space not in ("auto", "parameters"):
        raise UserError(
            f"merge.space={space} is for low-rank updates: whole models are merged in "
            "merge.space=parameters" + (", as by rule=ties/paper." if rule == "ties" else ".")
        )
    if parameters["rank"] is not None:
        raise UserError(
            "merge.rank cuts low-rank bricks, and whole models have none: leave it out."
        )
    if has_base:
        return
    why = None
    if signature.constants("merging", rule, "Rule").get("needs_base", True):
        why = f"rule={rule} merges"
    elif parameters["sparsify"] != "none":
        why = f"sparsify={parameters['sparsify']} drops numbers of"
    elif parameters["scale"] != 1:
        why = "merge.scale scales"
    if why is not None:
        raise UserError(
            f"{why} differences to the model that all were made from: name it, base=DIR."
        )


def _check_everywhere(weights: Weights, names: Sequence[str]) -> None:
    """The weights of every tensor can be told, and every filter is for one.

    Raises:
        UserError: with the tensor, or the filter.
    """
    for name in names:
        weights.at(name)
    for pattern in weights.filters:
        if not any(fits(pattern, name) for name in names):
            raise UserError(
                f"merge.filters: '{pattern}' matches no tensor of the models."
                f"{nearest(pattern, names)}"
            )


def _named(model: Model) -> dict[str, str]:
    return {"backbone": model.name, "fingerprint": model.fingerprint}


def rehearse(config: dict[str, Any], inputs: Inputs) -> None:
    """Looks whether rule, scope and memory suffice, as ``dry_run`` wants to know.

    Raises:
        UserError: they do not.
    """
    from cfm_train.merging.models.merge import rehearse as rehearse_merge

    rehearse_merge(task_of(inputs), _threads(config))


def task_of(inputs: Inputs) -> Task:
    """What the merge is given."""
    from cfm_train.merging.mix import make_mix
    from cfm_train.merging.models.task import Task

    mix = make_mix(inputs.parameters)
    sources = [model.fingerprint for model in inputs.models]
    if mix.sparsifier.random:  # what is drawn must not depend on shards
        sources = [content_of(model.tensors) for model in inputs.models]
    return Task(
        mix=mix,
        weights=inputs.weights,
        inputs=[model.tensors for model in inputs.models],
        base=None if inputs.base is None else inputs.base.tensors,
        plan=inputs.plan,
        sources=sources,
        names=[model.name for model in inputs.models],
    )


def _threads(config: Mapping[str, Any]) -> int:
    given: int | None = config["threads"]
    return given or len(os.sched_getaffinity(0))


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Writes the model and its card; returns the record's own part."""
    from cfm_train.merging.models.merge import merge_models

    began = time.perf_counter()
    if not inputs.written:
        merge_models(
            task_of(inputs),
            inputs.out,
            companion=inputs.companion.backbone.folder,
            texts={"config.json": new_config(config, inputs), MERGE_FILE: inputs.merge},
            shard_bytes=config["shard_bytes"],
            threads=_threads(config),
        )
    seconds = time.perf_counter() - began
    expression = _expression(inputs)
    everything = [*inputs.models, *([] if inputs.base is None else [inputs.base])]
    record = record_backbone(
        config,
        folder,
        inputs.out,
        inputs.library,
        operation="merge",
        note=(MERGE_FILE, inputs.merge),
        expression=expression,
        sources={model.backbone.folder: model.fingerprint for model in everything},
    )
    print(f"{inputs.out}: {len(inputs.plan.merged)} tensors in {seconds:.1f} s, {expression}")
    return record


def new_config(config: Mapping[str, Any], inputs: Inputs) -> str:
    """``config.json`` of the new model: the companion's, with the dtype of the new weights."""
    content = dict(inputs.companion.backbone.config)
    wanted = config["merge"]["dtype"]
    if wanted is not None:
        key = "torch_dtype" if "torch_dtype" in content else "dtype"
        content[key] = wanted
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _expression(inputs: Inputs) -> str:
    """What the card says that the model is."""
    rule = inputs.parameters["rule"]
    names = ", ".join(model.name for model in inputs.models)
    base = f", base={inputs.base.name}" if inputs.base else ""
    weights = json.loads(inputs.merge)["weights"]
    given = f", weights={weights}" if weights is not None else ""
    own = [*merging.own_arguments("merging", rule), "sparsify", "scope", "scale", "filters"]
    own += merging.own_arguments("merging/sparsify", inputs.parameters["sparsify"])
    more = "".join(f", {key}={inputs.parameters[key]}" for key in own)
    return f"merge({rule}, [{names}]{base}{given}{more})"
