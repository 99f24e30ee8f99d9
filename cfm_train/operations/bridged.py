"""The steps of joining two models by a bridge: where, in closed form, trained, and what it costs.

The operation `stitch_bridge.py` takes them one after the other. What is chosen by data (the stitch
point, λ, the checkpoint) is chosen on training and validation rows; figures are of test rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cfm_train.backbone.load import Backbone
from cfm_train.data.encode import TaskData
from cfm_train.library.card import Card
from cfm_train.library.store import Library
from cfm_train.operations import trained
from cfm_train.operations.setting import open_backbone
from cfm_train.stitching.layers.bridge import Bridge
from cfm_train.stitching.layers.calibrating import moments, similarity
from cfm_train.stitching.layers.cka import choose
from cfm_train.stitching.layers.measuring import Measured, difference, measure
from cfm_train.stitching.layers.ridge import Fit, Moments, solve
from cfm_train.stitching.layers.sources import Source
from cfm_train.stitching.layers.stitched import StitchedBackbone
from cfm_train.stitching.layers.stored import open_stitched
from cfm_train.tracking.metrics_file import MetricsFile
from cfm_train.training.checkpoint import read_position
from cfm_train.training.dataset import make_batch
from cfm_train.training.fit import Fitted
from cfm_train.training.fit import fit as fit_brick
from cfm_train.training.module import Diverged


def stitch_point(
    config: Mapping[str, Any], bottom: Backbone, top: Backbone, task: TaskData
) -> tuple[tuple[int, int], dict[str, Any] | None]:
    """Where to stitch, and the CKA matrix where it decided."""
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


def closed_form(
    config: Mapping[str, Any],
    bottom: Backbone,
    top: Backbone,
    at: tuple[int, int],
    task: TaskData,
) -> tuple[Fit, Moments]:
    """The ridge solution, and the moments of the training rows."""
    tokens, seed = config["calibration"]["tokens"], config["seed"]
    assert task.validation is not None
    seen = moments(bottom, top, at, task.train, tokens, seed)
    held_out = moments(bottom, top, at, task.validation, tokens, seed, like=seen)
    return solve(seen, held_out, config["calibration"]["ridge"]), seen


def opposite(
    config: Mapping[str, Any],
    bottom: Source,
    top: Source,
    task: TaskData,
    heatmap: Mapping[str, Any] | None,
) -> Measured | None:
    """The opposite order: first layers of the top under last ones of the bottom, in closed form.

    It is stitched at its own point of highest CKA. Both models are loaded once more, since those of
    the stitch have lost layers. None where that is not asked for.
    """
    if not config["opposite"]:
        return None
    above, _ = open_backbone(top.backbone, top.section, config["trainer"])
    below, _ = open_backbone(bottom.backbone, bottom.section, config["trainer"])
    if heatmap is None:
        tokens = config["calibration"]["cka_tokens"]
        values = similarity(above, below, task.train, tokens, config["seed"])
    else:
        values = [list(column) for column in zip(*heatmap["values"], strict=True)]
    at = choose(values, config["depth"])
    fit, _ = closed_form(config, above, below, at, task)
    backbone = StitchedBackbone(above, below, at)
    assert task.test is not None
    with backbone.slots.plugged([Bridge(list(at)).build(backbone).fitted(fit)]):
        return measure(backbone, task.spec, task.test)


def train(
    config: Mapping[str, Any],
    backbone: StitchedBackbone,
    bridge: Bridge,
    task: TaskData,
    folder: Path,
    wandb: Any,
) -> Fitted | None:
    """Trains the bridge in place like any other brick; None where that is not asked for."""
    if not config["train"]:
        return None
    name = task.spec.name
    position = read_position(folder / "checkpoints")
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.cut_back(position.step)
    try:
        return fit_brick(
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


def figures_of(
    arms: Mapping[str, Measured], turned: Measured | None, bootstrap: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Loss and perplexity of every model, each stitched one's penalty and the order effect, paired.

    Args:
        arms: what was measured, by name.
        turned: the opposite order in closed form. The order effect is its figure minus that of
            this order.
        bootstrap: resamples.
        seed: of the resampling.
    """
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
    if turned is not None:
        paired = difference(turned, arms["closed form"], bootstrap, seed)
        found |= {f"order effect/closed form/{m}": f.as_dict() for m, f in paired.items()}
    return found


def cells_of(
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


def loads_again(
    card: Card, library: Library, backbone: StitchedBackbone, bridge: Bridge, task: TaskData
) -> bool:
    """Whether the bridge, read from the library, gives the logits that it gave before."""
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
