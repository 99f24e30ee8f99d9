"""Join two language models by a linear bridge, and say what the stitch costs.

check    both models, tokenizers, rows, library, all before torch is imported
run      CKA ─► closed form ─► training ─► all models on the test documents ─► store ─► record

The steps are in `bridged.py`. Stitch point and λ are chosen on calibration and validation rows, the
trained bridge is the best one on validation rows, and the figures are those of test rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.backbone.fingerprint import fingerprint, tokenizer_hash
from cfm_train.backbone.named import same_tokenizer
from cfm_train.data.sources import Checked, check_all
from cfm_train.errors import UserError
from cfm_train.library.card import check_name
from cfm_train.library.store import Library
from cfm_train.operations import trained
from cfm_train.stitching.layers.sources import Source, open_source
from cfm_train.tracking.wandb_run import resolve_mode


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
    from cfm_train.data.encode import encode
    from cfm_train.operations import bridged
    from cfm_train.operations.setting import open_backbone, tracked
    from cfm_train.paths import cache_dir
    from cfm_train.stitching.layers.bridge import Bridge
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
    task = encode(inputs.task, bottom.tokenizer, cache_dir())
    print(trained.rows_line(inputs.task, task), flush=True)
    assert task.test is not None
    arms = {
        "bottom model": measure(bottom, task.spec, task.test),
        "top model": measure(top, task.spec, task.test),
    }
    at, heatmap = bridged.stitch_point(config, bottom, top, task)
    fit, seen = bridged.closed_form(config, bottom, top, at, task)
    same = bottom.checksum() == low and top.checksum() == high
    backbone = StitchedBackbone(bottom, top, at)
    before = backbone.checksum()

    random = Bridge(list(at)).build(backbone).random(seen, derive(seed, "random bridge"))
    bridge = Bridge(list(at)).build(backbone).fitted(fit)
    with tracked(config, folder) as wandb:
        for name, one in (("random bridge", random), ("closed form", bridge)):
            with backbone.slots.plugged([one]):
                arms[name] = measure(backbone, task.spec, task.test)
        fitted = bridged.train(config, backbone, bridge, task, folder, wandb)
        if fitted is not None:
            with backbone.slots.plugged([bridge]):
                arms["trained bridge"] = measure(backbone, task.spec, task.test)
        turned = bridged.opposite(config, inputs.bottom, inputs.top, task, heatmap)
        figures = bridged.figures_of(arms, turned, config["evaluation"]["bootstrap"], seed)
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
        loads = bridged.loads_again(card, inputs.library, backbone, bridge, task)
        wandb.artifact(card.name, "bridge", inputs.library.folder(card), {"version": card.version})
        wandb.summary({name: figure["value"] for name, figure in figures.items()})
    print(f"{card.ref} = {card.expression}, ridge {fit.ridge:g}")
    for name, figure in figures.items():
        if name.startswith(("penalty/", "order effect/")):
            print(f"{name}: {figure['value']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}]")
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
        "matrix": bridged.cells_of(arms, task.spec.name, figures),
        "curves": "metrics.jsonl" if fitted else None,
        **({"heatmaps": [heatmap]} if heatmap else {}),
        "wandb": wandb.as_record(),
    }
