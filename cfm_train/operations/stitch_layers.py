"""Make a backbone from layers of others, and write it as a transformers model folder.

check    slices, headers, tokenizers, the disk, all before torch is imported
run      configs and layers compared on the meta device ─► bytes copied ─► card, record

The weights lie in ``out``; the library holds the card, with what the model was made from, and
``stitch.json``, which the folder holds too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.backbone.folders import check_room, look_at
from cfm_train.backbone.named import same_tokenizer
from cfm_train.backbone.tensors import size_of
from cfm_train.errors import UserError
from cfm_train.library.card import check_name
from cfm_train.library.store import Library
from cfm_train.operations.made_backbone import record_backbone
from cfm_train.stitching.layers.sources import Slice, read_slices
from cfm_train.stitching.layers.writing import write_backbone
from cfm_train.tracking.wandb_setting import resolve_mode

STITCH_FILE = "stitch.json"


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        slices: the layers, bottom to top.
        library: where the card will go.
        out: the folder to write.
        stitch: the content of ``stitch.json``: what decides the model.
        written: whether an earlier start of this run has written the folder.
        fingerprints: content hashes for the config hash.
    """

    slices: list[Slice]
    library: Library
    out: Path
    stitch: str
    written: bool
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Checks everything that can be checked without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_name(config["name"])
    resolve_mode(config["tracking"]["mode"])
    slices = read_slices(config["slices"])
    sources = list({s.source.label: s.source for s in slices}.values())
    for other in sources[1:]:
        same_tokenizer(sources[0].backbone, other.backbone)
        kinds = [one.backbone.config["model_type"] for one in (sources[0], other)]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"'{sources[0].name}' is a {kinds[0]} and '{other.name}' a {kinds[1]}: layers are "
                "stitched as they are only within one architecture; use recipe=stitch/bridge."
            )
    stitch = {
        "slices": [
            {
                "backbone": s.source.name,
                "fingerprint": s.source.fingerprint,
                "layers": [s.start, s.stop],
            }
            for s in slices
        ],
        **{key: config[key] for key in ("embed", "head", "untie")},
    }
    text = json.dumps(stitch, indent=2, sort_keys=True) + "\n"
    out = Path(config["out"]).expanduser().absolute()
    written = look_at(out, STITCH_FILE, text)
    taken = [layer for s in slices for layer in s.source.layers[s.start : s.stop]]
    around = max(size_of(source.around) for source in sources) * (2 if config["untie"] else 1)
    check_room(out, sum(map(size_of, taken)) + around, "the stitched model")
    library = Library(config["library"])
    library.check_writable()
    fingerprints = {f"backbone/{s.label}": s.fingerprint for s in sources}
    return Inputs(slices, library, out, text, written, fingerprints)


def rehearse(config: dict[str, Any], inputs: Inputs) -> None:
    """Compares configs and layers, as ``dry_run`` wants to know.

    Raises:
        UserError: the models do not fit together.
    """
    _plan(config, inputs)


def _plan(config: dict[str, Any], inputs: Inputs) -> Any:
    from cfm_train.stitching.layers.assembly import assemble

    return assemble(
        inputs.slices, embed=config["embed"], head=config["head"], untie=config["untie"]
    )


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Writes the model and its card; returns the record's own part."""
    plan = _plan(config, inputs)
    texts = {
        "config.json": json.dumps(plan.config, indent=2, sort_keys=True) + "\n",
        STITCH_FILE: inputs.stitch,
    }
    companion = plan.companion.backbone.folder
    same = inputs.written or write_backbone(
        inputs.out, plan.tensors, texts, companion, config["shard_bytes"]
    )
    expression = f"stitch([{', '.join(map(str, inputs.slices))}])"
    record = record_backbone(
        config,
        folder,
        inputs.out,
        inputs.library,
        operation="stitch",
        note=(STITCH_FILE, inputs.stitch),
        expression=expression,
        sources={s.source.backbone.folder: s.source.fingerprint for s in inputs.slices},
    )
    count = sum(s.stop - s.start for s in inputs.slices)
    print(f"{inputs.out}: {count} layers, {expression}")
    record["checks"] |= {
        "tensors equal their sources": {"value": same, "tolerance": None, "passed": same}
    }
    return record
