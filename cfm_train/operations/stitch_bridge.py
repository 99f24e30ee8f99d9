"""Join two language models by a linear bridge, and say what the stitch costs.

check    both models, tokenizers, rows, library, all before torch is imported
run      CKA ─► closed form ─► training ─► five models on the test documents ─► store ─► record

Stitch point and λ are chosen on calibration and validation rows, the trained bridge is the best one
on validation rows, and the figures are those of test rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.backbone.fingerprint import fingerprint, tokenizer_hash
from cfm_train.backbone.named import same_tokenizer
from cfm_train.data.sources import Checked, check_all
from cfm_train.errors import UserError
from cfm_train.library.card import check_name
from cfm_train.library.store import Library
from cfm_train.operations import trained
from cfm_train.stitching.layers.sources import Source, open_source
from cfm_train.tracking.wandb_run import resolve_mode

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.data.encode import TaskData
    from cfm_train.stitching.layers.bridge import Bridge
    from cfm_train.stitching.layers.measuring import Measured
    from cfm_train.stitching.layers.stitched import StitchedBackbone


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        bottom, top: the two models.
        task: the rows, with validation and test.
        library: where the bridge will go.
        fingerprints: content hashes for the config hash.
    """

    bottom: Source
    top: Source
    task: Checked
    library: Library
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Checks everything that the run needs, without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_name(config["name"])
    resolve_mode(config["tracking"]["mode"])
    bottom, top = (open_source(config[key]) for key in ("bottom", "top"))
    same_tokenizer(bottom.backbone, top.backbone)
    _check_at(config, len(bottom.layers), len(top.layers))
    data = config["data"]
    if data["task"] != "causal" or data["tasks"]:
        raise UserError("data.task: a bridge is fitted to plain text: leave data.task=causal.")
    if data["pack"]:
        raise UserError(
            "data.pack: figures are paired by document, which packing mixes: leave it false."
        )
    for source in (bottom, top):
        longest = source.backbone.config.get(
            "max_position_embeddings", source.backbone.config.get("n_positions")
        )
        if longest is not None and data["max_length"] > longest:
            raise UserError(
                f"data.max_length={data['max_length']} is more than the {longest} positions of "
                f"'{source.name}': lower it."
            )
    if not config["calibration"]["ridge"]:
        raise UserError("calibration.ridge is empty: give at least one value, such as [0.001].")
    (task,) = check_all(data)
    for split in ("validation", "test"):
        if not task.rows.get(split):
            raise UserError(
                f"data: there are no {split} rows, on which the stitch is judged: name a file "
                f"(data.{split}=FILE) or set data.{split}_fraction=0.1."
            )
    library = Library(config["library"])
    library.check_writable()
    fingerprints = {"bottom": bottom.fingerprint, "top": top.fingerprint}
    fingerprints |= {f"data/{task.spec.name}/{k}": v for k, v in task.fingerprints.items()}
    return Inputs(bottom, top, task, library, fingerprints)


def _check_at(config: Mapping[str, Any], bottom: int, top: int) -> None:
    at, depth = config["at"], config["depth"]
    if at == "auto":
        if depth is not None and (
            len(depth) != 2 or not max(2, depth[0]) <= min(depth[1], bottom + top)
        ):
            raise UserError(
                f"depth={depth} cannot be: give the fewest and the most layers, from 2 to "
                f"{bottom + top}, as in depth=[{max(bottom, 2)},{bottom + 1}]."
            )
        return
    if depth is not None:
        raise UserError("depth counts with at=auto only: leave one of the two out.")
    if len(at) != 2 or not 1 <= at[0] <= bottom or not 0 <= at[1] < top:
        raise UserError(
            f"at={at} is no stitch point: give [i, j] with i from 1 to {bottom} (layers of the "
            f"bottom that run) and j from 0 to {top - 1} (layers of the top that are left out)."
        )


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Fits, trains, judges and stores the bridge; returns the record's own part.

    Raises:
        RuntimeError: training diverged; the message names step and rows.
    """
    from cfm_train.operations.setting import open_backbone, tracked
    from cfm_train.stitching.layers.measuring import measure
    from cfm_train.stitching.layers.stitched import StitchedBackbone, check_causal
    from cfm_train.stitching.layers.stored import store_bridge
    from cfm_train.training.cost import peak_memory
    from cfm_train.training.seeding import derive

    settings, seed = config["trainer"], config["seed"]
    bottom, low = open_backbone(inputs.bottom.backbone, inputs.bottom.section, settings)
    top, high = open_backbone(inputs.top.backbone, inputs.top.section, settings)
    for model in (bottom, top):
        check_causal(model)
    task = _encode(inputs, bottom)
    print(trained.rows_line(inputs.task, task), flush=True)
    assert task.test is not None
    arms = {
        "bottom model": measure(bottom, task.spec, task.test),
        "top model": measure(top, task.spec, task.test),
    }
    at, heatmap = _stitch_point(config, bottom, top, task)
    fit, seen = _closed_form(config, bottom, top, at, task)
    same = bottom.checksum() == low and top.checksum() == high
    backbone = StitchedBackbone(bottom, top, at)
    before = backbone.checksum()

    random = _bridge(backbone).random(seen, derive(seed, "random bridge"))
    bridge = _bridge(backbone).fitted(fit)
    with tracked(config, folder) as wandb:
        for name, one in (("random bridge", random), ("closed form", bridge)):
            with backbone.slots.plugged([one]):
                arms[name] = measure(backbone, task.spec, task.test)
        fitted = _train(config, inputs, backbone, bridge, task, folder, wandb)
        if fitted is not None:
            with backbone.slots.plugged([bridge]):
                arms["trained bridge"] = measure(backbone, task.spec, task.test)
        figures = _figures(arms, config["evaluation"]["bootstrap"], seed)
        same = same and backbone.checksum() == before
        same = same and all(
            fingerprint(one.backbone.folder) == one.fingerprint
            for one in (inputs.bottom, inputs.top)
        )
        card = store_bridge(
            bridge,
            inputs.library,
            backbone,
            name=config["name"],
            tokenizer=tokenizer_hash(inputs.bottom.backbone.folder),
            recipe=config,
            data=[
                {
                    "name": task.spec.name,
                    "fingerprint": inputs.task.fingerprints["train"],
                    "licence": None,
                }
            ],
            metrics=figures,
            run=folder.name,
        )
        loads = _loads_again(card, inputs.library, backbone, bridge, task)
        wandb.artifact(card.name, "bridge", inputs.library.folder(card), {"version": card.version})
        wandb.summary({name: figure["value"] for name, figure in figures.items()})
    print(f"{card.ref} = {card.expression}, ridge {fit.ridge:g}")
    return {
        "brick": {
            "name": card.name,
            "version": card.version,
            "path": str(inputs.library.folder(card)),
            "parents": [],
        },
        "backbone": {"id": backbone.id, "fingerprint": backbone.fingerprint, "unchanged": same},
        "metrics": figures,
        "checks": {
            "both models unchanged": {"value": same, "tolerance": None, "passed": same},
            "loaded again, same logits": {"value": loads, "tolerance": None, "passed": loads},
        },
        "cost": {
            "train_seconds": fitted.train_seconds if fitted else None,
            "tokens_per_second": fitted.tokens / max(fitted.train_seconds, 1e-9)
            if fitted
            else None,
            "peak_memory_bytes": peak_memory(),
            "trainable_parameters": sum(p.numel() for p in bridge.parameters()),
        },
        "data": trained.data_report({task.spec.name: inputs.task}),
        "matrix": _cells(arms, task.spec.name, figures),
        "curves": "metrics.jsonl" if fitted else None,
        **({"heatmaps": [heatmap]} if heatmap else {}),
        "wandb": wandb.as_record(),
    }


def _encode(inputs: Inputs, backbone: Backbone) -> TaskData:
    from cfm_train.data.encode import encode
    from cfm_train.paths import cache_dir

    return encode(inputs.task, backbone.tokenizer, cache_dir())


def _stitch_point(
    config: Mapping[str, Any], bottom: Backbone, top: Backbone, task: TaskData
) -> tuple[tuple[int, int], dict[str, Any] | None]:
    """Where to stitch, and the CKA matrix where it decided."""
    from cfm_train.stitching.layers.calibrating import similarity
    from cfm_train.stitching.layers.cka import choose

    if config["at"] != "auto":
        return (config["at"][0], config["at"][1]), None
    values = similarity(
        bottom, top, task.train, config["calibration"]["cka_tokens"], config["seed"]
    )
    at = choose(values, config["depth"])
    heatmap = {
        "title": f"CKA of states: {bottom.id} (rows), {top.id} (columns)",
        "rows": [str(n) for n in range(len(values))],
        "columns": [str(n) for n in range(len(values[0]))],
        "values": values,
        "chosen": list(at),
    }
    print(f"stitch point {list(at)}: CKA {values[at[0]][at[1]]:.3f}", flush=True)
    return at, heatmap


def _closed_form(
    config: Mapping[str, Any],
    bottom: Backbone,
    top: Backbone,
    at: tuple[int, int],
    task: TaskData,
) -> Any:
    """The ridge solution, and the moments of the training rows."""
    from cfm_train.stitching.layers.calibrating import moments
    from cfm_train.stitching.layers.ridge import solve

    tokens, seed = config["calibration"]["tokens"], config["seed"]
    assert task.validation is not None
    seen = moments(bottom, top, at, task.train, tokens, seed)
    held_out = moments(bottom, top, at, task.validation, tokens, seed, like=seen)
    return solve(seen, held_out, config["calibration"]["ridge"]), seen


def _bridge(backbone: StitchedBackbone) -> Bridge:
    from cfm_train.stitching.layers.bridge import Bridge

    return Bridge(list(backbone.at)).build(backbone)


def _train(
    config: Mapping[str, Any],
    inputs: Inputs,
    backbone: StitchedBackbone,
    bridge: Bridge,
    task: TaskData,
    folder: Path,
    wandb: Any,
) -> Any:
    """Trains the bridge in place like any other brick; None where that is not asked for."""
    from cfm_train.tracking.metrics_file import MetricsFile
    from cfm_train.training.checkpoint import read_position
    from cfm_train.training.fit import fit
    from cfm_train.training.module import Diverged

    if not config["train"]:
        return None
    name = task.spec.name
    position = read_position(folder / "checkpoints")
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.cut_back(position.step)
    try:
        return fit(
            backbone,
            bridge,
            {name: task},
            config["trainer"],
            seed=config["seed"],
            mixture=1.0,
            folder=folder,
            position=position,
            metrics=metrics,
            wandb=wandb,
        )
    except Diverged as error:
        raise RuntimeError(trained.where(error, {name: task})) from None


def _figures(arms: Mapping[str, Measured], bootstrap: int, seed: int) -> dict[str, dict[str, Any]]:
    """Loss and perplexity of every model, and each stitched one's penalty, paired."""
    from cfm_train.stitching.layers.measuring import difference

    found = {}
    for arm, measured in arms.items():
        for metric, figure in measured.scores(bootstrap, seed).items():
            found[f"test/{arm}/{metric}"] = figure.as_dict()
    for arm, measured in arms.items():
        if arm in ("bottom model", "top model"):
            continue
        for against in ("top", "bottom"):
            paired = difference(measured, arms[f"{against} model"], bootstrap, seed)
            for metric, figure in paired.items():
                name = "penalty" if against == "top" else "against bottom model"
                found[f"{name}/{arm}/{metric}"] = figure.as_dict()
    return found


def _cells(
    arms: Mapping[str, Measured], task: str, figures: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Rows of the matrix: the two models are the ceiling, the random bridge is the floor."""
    roles = {"bottom model": "ceiling", "top model": "ceiling", "random bridge": "floor"}
    return [
        {
            "brick": arm,
            "task": task,
            "metric": "perplexity",
            **figures[f"test/{arm}/perplexity"],
            "role": roles.get(arm, "merged"),
        }
        for arm in arms
    ]


def _loads_again(
    card: Any, library: Library, backbone: StitchedBackbone, bridge: Bridge, task: TaskData
) -> bool:
    """Whether the bridge, read from the library, gives the logits that it gave before."""
    import torch

    from cfm_train.stitching.layers.stored import open_stitched
    from cfm_train.training.dataset import make_batch

    again, read = open_stitched(
        card,
        library,
        bottom=None,
        top=None,
        dtype=str(backbone.dtype).removeprefix("torch."),
        device=str(backbone.device),
    )
    batch = make_batch(
        "probe", task.train, range(min(4, len(task.train))), backbone.tokenizer.pad_token_id
    )
    inputs = {k: batch[k].to(backbone.device) for k in ("input_ids", "attention_mask")}
    with torch.inference_mode(), backbone.slots.plugged([bridge]), again.slots.plugged([read]):
        return bool(torch.equal(backbone.logits(**inputs), again.logits(**inputs)))
