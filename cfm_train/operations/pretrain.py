"""Make a backbone from text alone: a tokenizer and a Llama-type model, trained from scratch.

check    domains, sizes, the disk, all before torch is imported
run      tokenizer ─► first weights ─► fit ─► the last weights written ─► domains judged ─► card

The weights lie in ``out``; the library holds the card, and ``pretrain.json``, which tells all that
decides the model and which the folder holds too. Each domain is judged by the folder as it was
written, loaded like any backbone. Text that is held out draws the curve of training and chooses
nothing, so that the figures are those of a test.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.backbone.folders import check_room, flush, look_at, written_aside
from cfm_train.backbone.spec import resolve
from cfm_train.data.corpora import Corpora, read
from cfm_train.errors import UserError
from cfm_train.library.card import check_name
from cfm_train.library.store import Library
from cfm_train.operations import pretrained, trained
from cfm_train.tracking.wandb_setting import resolve_mode

PRETRAIN_FILE = "pretrain.json"
SNAPSHOTS = "snapshots"
#: The model before its first step, in the run's folder.
FIRST = "first"
#: Bytes of a number on disk.
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        corpora: the domains with all their documents.
        library: where the card will go.
        out: the folder to write.
        note: the content of ``pretrain.json``: what decides the model.
        written: whether an earlier start of this run has written the folder.
        fingerprints: content hashes for the config hash.
    """

    corpora: Corpora
    library: Library
    out: Path
    note: str
    written: bool
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Checks everything that can be checked without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_name(config["name"])
    resolve_mode(config["tracking"]["mode"])
    _check_sizes(config)
    corpora = read(config["data"])
    decides = ("architecture", "tokenizer", "trainer", "seed", "snapshots", "dtype")
    trainer = {key: v for key, v in config["trainer"].items() if key not in ("threads", "samples")}
    note = {key: config[key] for key in decides} | {
        "trainer": trainer,
        "data": {
            "domains": [name for name in corpora.domains if name not in corpora.left_out],
            "left_out": corpora.left_out,
            "unit": config["data"]["unit"],
            "max_length": config["data"]["max_length"],
            "fingerprints": corpora.text.fingerprints,
        },
    }
    text = json.dumps(note, indent=2, sort_keys=True) + "\n"
    out = Path(config["out"]).expanduser().absolute()
    written = look_at(out, PRETRAIN_FILE, text)
    if not written:
        copies = 1 + len(config["snapshots"])
        check_room(out, copies * parameters(config) * WIDTHS[config["dtype"]], "the model")
    library = Library(config["library"])
    library.check_writable()
    return Inputs(corpora, library, out, text, written, corpora.fingerprints)


def _check_sizes(config: Mapping[str, Any]) -> None:
    """Refuses an architecture that cannot be, and snapshots that would never come."""
    shape, length = config["architecture"], config["data"]["max_length"]
    heads, groups = shape["num_attention_heads"], shape["num_key_value_heads"]
    if shape["hidden_size"] % (2 * heads):
        raise UserError(
            f"architecture.hidden_size={shape['hidden_size']} is no even multiple of "
            f"num_attention_heads={heads}: rotary positions turn pairs of numbers."
        )
    if heads % groups:
        raise UserError(
            f"architecture.num_attention_heads={heads} is no multiple of num_key_value_heads="
            f"{groups}: each group of heads shares one."
        )
    if length > shape["max_position_embeddings"]:
        raise UserError(
            f"data.max_length={length} is more than architecture.max_position_embeddings="
            f"{shape['max_position_embeddings']}: lower it."
        )
    if config["trainer"]["patience"] is not None:
        raise UserError(
            "trainer.patience would stop by the held-out text that the figures are of: leave it "
            "null, and set trainer.max_steps."
        )
    steps, snapshots = config["trainer"]["max_steps"], config["snapshots"]
    if steps is not None and snapshots and max(snapshots) > steps:
        raise UserError(f"snapshots: there is no step {max(snapshots)} in {steps} steps.")


def parameters(config: Mapping[str, Any]) -> int:
    """How many numbers the model has."""
    shape = config["architecture"]
    wide, inner = shape["hidden_size"], shape["intermediate_size"]
    narrow = wide // shape["num_attention_heads"] * shape["num_key_value_heads"]
    layer = 2 * wide * wide + 2 * wide * narrow + 3 * wide * inner + 2 * wide
    tables = 1 if shape["tie_word_embeddings"] else 2
    tokens: int = config["tokenizer"]["vocab_size"]
    return int(shape["num_hidden_layers"] * layer + wide + tables * tokens * wide)


def rehearse(config: dict[str, Any], inputs: Inputs) -> None:
    """Says what would be trained on what, for ``dry_run``."""
    print(_lines(config, inputs))


def _lines(config: Mapping[str, Any], inputs: Inputs) -> str:
    corpora = inputs.corpora
    size = sum(len(row["text"][0].encode()) for row in corpora.text.rows["train"])
    lines = [
        f"{parameters(config):,} parameters, on {size / 1e6:.1f} MB of "
        f"{', '.join(name for name in corpora.domains if name not in corpora.left_out)}",
        trained.rows_line(corpora.text).partition("; no test")[0],
    ]
    if corpora.left_out:
        lines.append(f"left out, judged alone: {', '.join(corpora.left_out)}")
    return "\n".join(lines)


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Trains, writes and judges the model; returns the record's own part.

    Raises:
        RuntimeError: training diverged; the message names step and documents.
    """
    import torch

    from cfm_train.backbone.dtypes import native_dtype
    from cfm_train.backbone.fresh import write_model
    from cfm_train.data.encode import encode
    from cfm_train.operations.made_backbone import put_backbone
    from cfm_train.operations.setting import brick_entry, open_backbone, tracked, unchanged
    from cfm_train.paths import cache_dir
    from cfm_train.tracking.metrics_file import MetricsFile
    from cfm_train.training.checkpoint import read_position
    from cfm_train.training.fit import fit
    from cfm_train.training.module import Diverged
    from cfm_train.training.samples import SampleOutputs
    from cfm_train.training.snapshots import Snapshots
    from cfm_train.training.whole_model import WholeModel

    settings, dtype = config["trainer"], getattr(torch, config["dtype"])
    print(_lines(config, inputs), flush=True)
    first = resolve({"path": str(_first_weights(config, inputs, folder))})
    backbone, _ = open_backbone(first, {"dtype": "float32"}, settings)
    model = WholeModel().build(backbone)
    native = native_dtype(backbone.device) == torch.bfloat16
    tasks = {"text": encode(inputs.corpora.text, backbone.tokenizer, cache_dir())}
    position = read_position(folder / "checkpoints")
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.cut_back(position.step)

    def write(where: Path) -> None:
        write_model(backbone.model, backbone.tokenizer, where, dtype)

    with tracked(config, folder) as wandb:
        samples = SampleOutputs(backbone, tasks, settings["samples"], wandb)
        try:
            fitted = fit(
                backbone,
                model,
                tasks,
                settings,
                seed=config["seed"],
                mixture=1.0,
                folder=folder,
                position=position,
                metrics=metrics,
                wandb=wandb,
                callbacks=[
                    Snapshots(config["snapshots"], folder / SNAPSHOTS, write),
                    *([samples] if settings["samples"] else []),
                ],
                keep_last=True,
                mixed={"auto": native, "bfloat16": True}.get(settings["precision"], False),
            )
        except Diverged as error:
            raise RuntimeError(trained.where(error, tasks)) from None
        if not inputs.written:
            with written_aside(inputs.out) as aside:
                write(aside)
                _put_snapshots(folder / SNAPSHOTS, aside / SNAPSHOTS)
                (aside / PRETRAIN_FILE).write_text(inputs.note, encoding="utf-8")
        there = resolve({"path": str(inputs.out)})
        made, before = open_backbone(there, {"dtype": "auto"})
        same = pretrained.same_weights(backbone.model, made.model, dtype)
        figures, cells = pretrained.judge(config, made, inputs.corpora)
        still = unchanged(made, before, there)
        card = put_backbone(
            config,
            folder,
            inputs.out,
            inputs.library,
            wandb,
            operation="pretrain",
            note=(PRETRAIN_FILE, inputs.note),
            expression=f"pretrain([{', '.join(json.loads(inputs.note)['data']['domains'])}])",
            metrics=figures,
            data=[
                {"name": name, "fingerprint": one.fingerprints["train"], "licence": None}
                for name, one in inputs.corpora.domains.items()
                if name not in inputs.corpora.left_out
            ],
        )
        wandb.summary({name: figure["value"] for name, figure in figures.items()})
    return {
        "brick": brick_entry(card, inputs.library),
        "backbone": {
            "id": inputs.out.name,
            "fingerprint": card.interface["fingerprint"],
            "unchanged": still,
        },
        "metrics": figures,
        "checks": {
            "the folder holds what was trained": {"value": same, "tolerance": None, "passed": same}
        },
        "cost": fitted.cost(model.parameter_count()),
        "data": trained.data_report({"text": inputs.corpora.text}),
        "matrix": cells,
        "samples": samples.latest,
        "curves": "metrics.jsonl",
        "wandb": wandb.as_record(),
    }


def _first_weights(config: Mapping[str, Any], inputs: Inputs, folder: Path) -> Path:
    """The folder of the model before its first step; made once, so that a resumed run finds it."""
    import torch

    from cfm_train.backbone.fresh import new_model, train_tokenizer, write_model
    from cfm_train.training.seeding import derive

    first = folder / FIRST
    if not first.is_dir():
        texts = (row["text"][0] for row in inputs.corpora.text.rows["train"])
        tokenizer = train_tokenizer(
            texts,
            config["tokenizer"]["vocab_size"],
            config["architecture"]["max_position_embeddings"],
        )
        seed = derive(config["seed"], "weights")
        model = new_model(config["architecture"], tokenizer, seed)
        with written_aside(first) as aside:
            write_model(model, tokenizer, aside, torch.float32)
    return first


def _put_snapshots(source: Path, target: Path) -> None:
    if not source.is_dir():
        return
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        flush(path)
